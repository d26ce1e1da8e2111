"""Readers of text that users bring: files of every common layout, folders, and data sets of the hub."""
