"""Draw, cut out, generate, check: for all requests in progress at once. ``assemble.load`` loads the models for it."""
