"""3D Gaussian splats: the data, cameras, the PLY format, differentiable rasterising and adaptive density control."""
