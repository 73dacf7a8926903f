"""A product of 8-bit inputs and packed weights, with the quantization of the inputs and all that follows in one op."""

from kernels_pallas.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
