"""Seconds that each step of a stop may take after SIGTERM. Their sum is less than stop_competitive.sh waits."""

# For workers to finish their tasks.
WORKERS_S = 15.0
# For running submissions. Results that are not answered by then stay in the spool.
SUBMISSIONS_S = 8.0
# For workers and submissions together: if workers take long, submissions have less.
TASKS_S = 20.0
# For the metrics server's thread, which checks twice a second, and for the ledger's last rows.
METRICS_S = 0.5
LEDGER_S = 2.0
# For closing connections, for threads that still process a result, and for Python's exit.
END_S = 1.5
TOTAL_S = TASKS_S + METRICS_S + LEDGER_S + END_S
