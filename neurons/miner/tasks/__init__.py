"""From a pull to a result: when to pull, how many tasks to hold, and how many candidates to make."""
