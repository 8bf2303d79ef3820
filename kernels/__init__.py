"""Triton kernels, one file per op: the CUDA backend of infer_fast.ops."""
