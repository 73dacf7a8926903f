"""Signs of numbers as bits, with the compression error kept for the next step: what 1-bit optimizers send."""

from kernels_pallas.sign_compress.api import average, compress, expand

__all__ = ["average", "compress", "expand"]
