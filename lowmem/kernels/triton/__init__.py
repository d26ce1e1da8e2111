"""Our own kernels for cards, in Triton: one source for NVIDIA, AMD and Intel."""
