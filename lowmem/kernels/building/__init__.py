"""How the C kernels (lowmem/kernels/csrc) become a library inside a wheel. Needs nothing but setuptools."""
