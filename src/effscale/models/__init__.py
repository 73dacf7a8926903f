"""A single Transformer built from small modules; each model family is a config of it."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.models.activations import ACTIVATIONS
    from effscale.models.block import Block, BlockGroup
    from effscale.models.cache import KVCache, empty_cache, grow_cache
    from effscale.models.config import (
        AttentionConfig,
        BlockConfig,
        FeedForwardConfig,
        Group,
        HeadConfig,
        NormConfig,
        PatchInputs,
        TokenInputs,
        TransformerConfig,
    )
    from effscale.models.context import Context, build_context, positions_of, positions_within
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
    from effscale.models.grouping import group_layers
    from effscale.models.heads import ClassHead, LMHead
    from effscale.models.image_size import resize_images
    from effscale.models.layers import Dense, Embedding, LayerNorm, RMSNorm, dropout
    from effscale.models.lora import LoRA, add_lora, is_adapter, merge_lora, unmerge_lora
    from effscale.models.mlp import MLPConfig
    from effscale.models.other_config import with_config
    from effscale.models.other_heads import replace_heads
    from effscale.models.positions import (
        Alibi,
        LearnedPositions,
        Rotary,
        alibi_slopes,
        rotary_angles,
        rotate,
    )
    from effscale.models.presets import PRESETS, abstract, num_params, preset
    from effscale.models.reports import aux_loss, by_layer, report_means
    from effscale.models.rotary_scaling import (
        LinearScaling,
        Llama3Scaling,
        RotaryScaling,
        YarnScaling,
    )
    from effscale.models.stacking import (
        for_decoding,
        merge_groups,
        replace_layers,
        split_groups,
        take_layers,
        unroll,
    )
    from effscale.models.transformer import Encoded, RunGroup, Transformer, run_group
    from effscale.models.weights import (
        Affine,
        Weight,
        dense,
        finish,
        map_weights,
        matmul,
        matmuls,
        take,
        transpose,
    )

__all__ = [
    "ACTIVATIONS",
    "PRESETS",
    "Affine",
    "Alibi",
    "AttentionConfig",
    "Block",
    "BlockConfig",
    "BlockGroup",
    "ClassHead",
    "Context",
    "Dense",
    "Embedding",
    "Encoded",
    "FeedForwardConfig",
    "Group",
    "HeadConfig",
    "KVCache",
    "LMHead",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LoRA",
    "MLPConfig",
    "NormConfig",
    "PatchInputs",
    "RMSNorm",
    "Rotary",
    "RotaryScaling",
    "RunGroup",
    "TokenInputs",
    "Transformer",
    "TransformerConfig",
    "Weight",
    "YarnScaling",
    "abstract",
    "add_lora",
    "alibi_slopes",
    "aux_loss",
    "bert",
    "bert_pretraining_heads",
    "bloom",
    "build_context",
    "by_layer",
    "dense",
    "dropout",
    "empty_cache",
    "finish",
    "for_decoding",
    "gpt2",
    "gptj",
    "group_layers",
    "grow_cache",
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
    "positions_of",
    "positions_within",
    "preset",
    "replace_heads",
    "replace_layers",
    "report_means",
    "resize_images",
    "rotary_angles",
    "rotate",
    "run_group",
    "split_groups",
    "take",
    "take_layers",
    "transpose",
    "unmerge_lora",
    "unroll",
    "vit",
    "with_config",
]

lazy_package(__name__)
