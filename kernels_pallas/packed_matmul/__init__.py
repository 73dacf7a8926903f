"""A product of floats and packed weights, which are dequantized only inside it, for the few rows of decoding."""

from kernels_pallas.packed_matmul.api import packed_matmul

__all__ = ["packed_matmul"]
