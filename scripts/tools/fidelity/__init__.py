"""Runs the authors' own code and ours on the same random weights, and tells how far apart the results are."""
