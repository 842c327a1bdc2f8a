"""Operations of the proxy: `reference` specifies each in plain PyTorch."""
