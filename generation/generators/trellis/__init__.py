"""TRELLIS (Xiang et al., 2024, arXiv:2412.01506): a picture's sparse structure first, then Gaussians on it."""
