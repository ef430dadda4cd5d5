"""Guidance of an optimisation by diffusion models (score distillation)."""
