"""The study: evaluating and comparing methods, what their routing is worth, and results with intervals."""
