"""Who is asked, when by its own clock, and how."""
