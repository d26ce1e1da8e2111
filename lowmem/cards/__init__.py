"""Cards: GPUs of NVIDIA, AMD, Intel and Apple, as torch presents them."""
