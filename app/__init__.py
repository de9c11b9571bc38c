"""The Streamlit app; `app/main.py` is what `make app` runs, its pages are in `pages/`."""
