"""Signs of numbers as bits, with the error that this makes kept for the next time: what 1-bit optimizers send."""

from kernels_pallas.sign_compress.api import average, compress, expand

__all__ = ["average", "compress", "expand"]
