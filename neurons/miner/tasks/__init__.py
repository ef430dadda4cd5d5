"""From a pull to a result: ``task_manager`` decides on pulls, ``admission`` on how many tasks are held."""
