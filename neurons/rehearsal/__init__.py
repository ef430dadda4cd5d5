"""Validators on loopback that keep the subnet's rules, for practice and for tests."""
