"""Folders in the layout of compressed-tensors, which transformers and vLLM load."""
