"""Measure the difficulty of every sample once, in many processes, and store it as an index."""
