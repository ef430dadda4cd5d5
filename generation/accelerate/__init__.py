"""What makes models fast, and nothing that a result means."""
