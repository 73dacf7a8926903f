"""Quantization, from 8 bits to 1: ZeroQuant and XTC."""

from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.files.load import load_packed
from effscale.quant.files.save import save_packed
from effscale.quant.formats import Format
from effscale.quant.gram_rounding import gptq
from effscale.quant.inputs import InputRange, input_grams, input_ranges
from effscale.quant.lkd import LKD, Distilled, distill_layers
from effscale.quant.packed import PackedWeight, pack_weight
from effscale.quant.qarrays import from_qarray, to_qarray
from effscale.quant.quantizers import Quantized, fake_quantize, quantize, scale_shape
from effscale.quant.recipes import (
    Recipe,
    Rule,
    dequantize_model,
    fake_quantize_model,
    quantize_model,
    w1a8,
    w2a8,
    w4a8,
    w4a16,
    w8a8,
)
from effscale.quant.sensitivity import sensitivity

__all__ = [
    "LKD",
    "Distilled",
    "FakeQuantizedWeight",
    "Format",
    "InputRange",
    "PackedWeight",
    "Quantized",
    "Recipe",
    "Rule",
    "dequantize_model",
    "distill_layers",
    "fake_quantize",
    "fake_quantize_model",
    "from_qarray",
    "gptq",
    "input_grams",
    "input_ranges",
    "load_packed",
    "pack_weight",
    "quantize",
    "quantize_model",
    "save_packed",
    "scale_shape",
    "sensitivity",
    "to_qarray",
    "w1a8",
    "w2a8",
    "w4a8",
    "w4a16",
    "w8a8",
]
