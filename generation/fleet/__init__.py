"""Several engines as one: a worker process for each GPU, and their supervisor."""
