"""Packed weights in files: compressed-tensors' layout, GGUF's blocks, and a layout of our own."""
