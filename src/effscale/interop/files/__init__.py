"""Files of weights: reading and writing them, without running what they hold."""
