"""The speech LLMs that can be transcribed with, one file per family."""
