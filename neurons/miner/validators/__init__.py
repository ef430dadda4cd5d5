"""Which validators are asked for tasks, when by their clocks, and how."""
