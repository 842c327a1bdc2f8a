"""A stack on a GPU: token-major, bf16, one captured graph a step, over `regmix_kernels`."""
