"""Figures: pure functions from tidy data to plotly figures."""
