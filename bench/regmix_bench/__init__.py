"""Benchmarks of regmix-fast: one module per subject, records made by `harness`."""
