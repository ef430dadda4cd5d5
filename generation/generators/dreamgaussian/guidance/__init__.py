"""Diffusion models that tell an optimised scene how it should look."""
