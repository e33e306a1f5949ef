"""Checkpoints and golden templates: the pause, what they consist of, and how they go."""
