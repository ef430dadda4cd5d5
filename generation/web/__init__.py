"""The HTTP side: routes, every limit on what comes in, what clients are told."""
