"""A stand-in for one H100, so that the CUDA path is run and checked on a machine that has none.

C stubs take the place of the CUDA runtime and driver under a CUDA build of torch. Device memory is host memory;
streams, events, the caching allocator and graph capture are torch's own code, so that its own checks of a capture fire.
What kernels would do is either computed on the CPU (emulation) or left out (record.idle). It shows that what is
captured is whole, lawful and gives its memory back; it says nothing of time, of races between streams, of the
arithmetic of Triton's kernels (its interpreter is for that), or of what cuDNN, cuBLAS, DALI and torch.compile do.
"""
