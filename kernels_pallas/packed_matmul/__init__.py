"""A product of floats and packed weights that become floats only within it, for the few rows of decoding."""

from kernels_pallas.packed_matmul.api import packed_matmul

__all__ = ["packed_matmul"]
