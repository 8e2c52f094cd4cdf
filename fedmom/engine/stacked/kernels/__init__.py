"""Triton kernels of the stacked engine: they need CUDA, or Triton's interpreter for tests (TRITON_INTERPRET=1)."""
