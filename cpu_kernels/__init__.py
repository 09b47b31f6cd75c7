"""Loops over arrays on the CPU: weight formats, threads, and attention over a paged KV cache.

Import the submodule you need (`from cpu_kernels.attention import decode_attention`): importing
the package itself stays free of numba, which takes 0.4 s.
"""
