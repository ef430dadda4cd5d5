"""Text and one view to Gaussians: DreamGaussian's optimisation under a diffusion model's guidance."""
