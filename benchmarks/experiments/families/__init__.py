"""Every causal language model of transformers, tried as tiny random models; run it with `python -m`."""
