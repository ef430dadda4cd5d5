"""Plain values that every other folder may use: options, requests, results, limits. No torch."""
