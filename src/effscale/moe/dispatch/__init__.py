"""Ways to move tokens to their experts and back."""
