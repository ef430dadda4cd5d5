"""The generation services: the client of one, and the pool of all."""
