"""How long each step of a stop may take, in seconds from SIGTERM on: together less than stop_competitive.sh waits."""

# For the workers to finish what they have.
WORKERS_S = 15.0
# For submissions under way. What is not answered then stays in the spool.
SUBMISSIONS_S = 8.0
# For both together: there is less for submissions where the workers take long.
TASKS_S = 20.0
# For the thread of the metrics' server, which looks up twice a second, and for the ledger's last rows.
METRICS_S = 0.5
LEDGER_S = 2.0
# For connections to be closed, for threads at work on a result, and for Python to end.
END_S = 1.5
TOTAL_S = TASKS_S + METRICS_S + LEDGER_S + END_S
