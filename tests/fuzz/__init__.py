"""Hostile checkpoints: what anybody may have put into a folder, and what must come of it."""
