"""The validators: which are eligible, what time each has, and how they are called."""
