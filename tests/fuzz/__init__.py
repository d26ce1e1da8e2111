"""Hostile checkpoints: every command must refuse them with one clear line."""
