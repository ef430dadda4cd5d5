"""FastAPI service that turns prompts into 3D Gaussian splats."""
