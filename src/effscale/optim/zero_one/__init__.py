"""0/1 Adam: its policies, its mathematics, and the transformation."""
