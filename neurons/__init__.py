"""Asyncio miner for Bittensor subnet 17. No torch in here."""
