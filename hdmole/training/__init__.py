"""Training: corpora of features, the loop, the adaptation methods and what they share."""
