"""Decoders: `contract.py` is the interface, `selection.py` chooses one for a model."""
