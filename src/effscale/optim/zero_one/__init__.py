"""0/1 Adam: its policies, its update rules, and the optax transformation."""
