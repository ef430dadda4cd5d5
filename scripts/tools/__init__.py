"""Comparisons and pictures for people who work on this project."""
