"""Packed weights in files: the layout of compressed-tensors, the blocks of GGUF, and effscale's own layout."""
