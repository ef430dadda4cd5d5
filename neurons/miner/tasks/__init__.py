"""From a pull to a result: polling, how many tasks are held, the workers."""
