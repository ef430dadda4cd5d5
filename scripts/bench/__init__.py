"""Benchmarks, and what they and the tests simulate with."""
