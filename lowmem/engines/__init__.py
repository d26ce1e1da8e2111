"""Other programs that serve our checkpoints: vLLM, with its command written and its process watched by us."""
