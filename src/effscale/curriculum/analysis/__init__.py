"""The difficulty of every sample, measured once by many processes and kept as an index."""
