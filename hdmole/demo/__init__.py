"""The demo model: its sentences, voices, corpus and training recipe."""
