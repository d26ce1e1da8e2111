"""The KV cache: `contract.py` is the interface, each other file one way to store the rows."""
