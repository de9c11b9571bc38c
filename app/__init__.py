"""The Streamlit app. `make app` runs `app/main.py`; the pages are in `pages/`."""
