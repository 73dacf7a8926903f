"""Quantization, from 8 bits to 1: ZeroQuant and XTC."""

from effscale.quant.formats import Format
from effscale.quant.quantizers import Quantized, fake_quantize, quantize, scale_shape

__all__ = ["Format", "Quantized", "fake_quantize", "quantize", "scale_shape"]
