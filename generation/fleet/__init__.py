"""Several engines as one: a process for each GPU, watched from here."""
