"""The chat of `lowmem run` in a terminal."""
