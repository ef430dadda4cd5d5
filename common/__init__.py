"""What the miner and the generation service both need: splat files and log lines. No torch."""
