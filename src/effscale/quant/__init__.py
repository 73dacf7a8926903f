"""Quantization, from 8 bits to 1: ZeroQuant and XTC."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.quant.bit_schedules import BitSchedule, fake_quantize_at
    from effscale.quant.distillation import (
        DistillationOutputs,
        LayerMap,
        distillation_loss,
        one_stage_loss,
    )
    from effscale.quant.fake import at_step, scheduled_step
    from effscale.quant.formats import Format
    from effscale.quant.gram_rounding import gptq
    from effscale.quant.inputs import input_grams, input_ranges
    from effscale.quant.lkd import LKD, distill_layers
    from effscale.quant.packed import pack_weight
    from effscale.quant.pruning.masks import Pruning, top_k_mask
    from effscale.quant.pruning.rules import PruneRule, merge_masks, prune_model
    from effscale.quant.pruning.shrink import shrink_model
    from effscale.quant.pruning.weight import prune_weight
    from effscale.quant.qarrays import from_qarray, to_qarray
    from effscale.quant.quantizers import fake_quantize, quantize
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
    from effscale.quant.sizes import model_size

__all__ = [
    "LKD",
    "BitSchedule",
    "DistillationOutputs",
    "Format",
    "LayerMap",
    "PruneRule",
    "Pruning",
    "Recipe",
    "Rule",
    "at_step",
    "dequantize_model",
    "distill_layers",
    "distillation_loss",
    "fake_quantize",
    "fake_quantize_at",
    "fake_quantize_model",
    "from_qarray",
    "gptq",
    "input_grams",
    "input_ranges",
    "merge_masks",
    "model_size",
    "one_stage_loss",
    "pack_weight",
    "prune_model",
    "prune_weight",
    "quantize",
    "quantize_model",
    "scheduled_step",
    "sensitivity",
    "shrink_model",
    "to_qarray",
    "top_k_mask",
    "w1a8",
    "w2a8",
    "w4a8",
    "w4a16",
    "w8a8",
]

lazy_package(__name__)
