"""Corpora of speech: turning them into manifests, and checking what is in a manifest."""
