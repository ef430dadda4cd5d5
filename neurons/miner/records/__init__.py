"""What happened, and what follows from it."""
