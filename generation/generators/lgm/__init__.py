"""LGM (Tang et al. 2024, https://arxiv.org/abs/2402.05054): a few views of an object to Gaussians in one pass."""
