"""A product of 8-bit inputs and packed weights in one op, including the quantization of the inputs, bias and activation."""

from kernels_pallas.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
