"""Events, the ledger and metrics of them, and what follows from them: verdicts, standings, policy."""
