"""Bits for each linear: how much each one matters, what a budget allows, and the best allocation."""
