"""A single Transformer built from small modules; each model family is a config of it."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.models.cache import empty_cache
    from effscale.models.config import (
        AttentionConfig,
        BlockConfig,
        Group,
        NormConfig,
        PatchInputs,
        TokenInputs,
        TransformerConfig,
    )
    from effscale.models.context import Context, build_context
    from effscale.models.families import (
        bert,
        bert_pretraining_heads,
        bloom,
        gpt2,
        gptj,
        llama,
        neox,
        opt,
        vit,
    )
    from effscale.models.heads import ClassHead, LMHead
    from effscale.models.image_size import resize_images
    from effscale.models.layers import Dense
    from effscale.models.lora import LoRA, add_lora, is_adapter, merge_lora, unmerge_lora
    from effscale.models.mlp import MLPConfig
    from effscale.models.other_config import with_config
    from effscale.models.other_heads import replace_heads
    from effscale.models.positions import Alibi, LearnedPositions, Rotary
    from effscale.models.presets import PRESETS, abstract_model, num_params, preset
    from effscale.models.reports import aux_loss, by_layer
    from effscale.models.rotary_scaling import LinearScaling, Llama3Scaling, YarnScaling
    from effscale.models.stacking import (
        merge_groups,
        replace_layers,
        split_groups,
        take_layers,
        unroll,
    )
    from effscale.models.transformer import Transformer, run_group
    from effscale.models.weights import Affine, Weight, finish, map_weights, matmul, matmuls

__all__ = [
    "PRESETS",
    "Affine",
    "Alibi",
    "AttentionConfig",
    "BlockConfig",
    "ClassHead",
    "Context",
    "Dense",
    "Group",
    "LMHead",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LoRA",
    "MLPConfig",
    "NormConfig",
    "PatchInputs",
    "Rotary",
    "TokenInputs",
    "Transformer",
    "TransformerConfig",
    "Weight",
    "YarnScaling",
    "abstract_model",
    "add_lora",
    "aux_loss",
    "bert",
    "bert_pretraining_heads",
    "bloom",
    "build_context",
    "by_layer",
    "empty_cache",
    "finish",
    "gpt2",
    "gptj",
    "is_adapter",
    "llama",
    "map_weights",
    "matmul",
    "matmuls",
    "merge_groups",
    "merge_lora",
    "neox",
    "num_params",
    "opt",
    "preset",
    "replace_heads",
    "replace_layers",
    "resize_images",
    "run_group",
    "split_groups",
    "take_layers",
    "unmerge_lora",
    "unroll",
    "vit",
    "with_config",
]

lazy_package(__name__)
