"""The miner: polls validators, has tasks generated, submits the results."""
