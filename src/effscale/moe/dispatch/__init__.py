"""Ways of bringing tokens to their experts and back."""
