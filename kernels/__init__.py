"""Triton kernels, the CUDA backend of infer_fast.ops: one file per op, or a few that share its name."""
