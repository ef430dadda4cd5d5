"""Makes models fast without changing their results, but for rounding. GPU kernels are in ``kernels``."""
