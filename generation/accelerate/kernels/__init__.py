"""Our own GPU kernels, in Triton."""
