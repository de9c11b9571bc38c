"""The study: evaluating and comparing methods, analysing their routing, and storing results."""
