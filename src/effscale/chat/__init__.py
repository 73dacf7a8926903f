"""A conversation with a model in the terminal or on a web page."""
