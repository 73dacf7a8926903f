"""Every foreign format: model folders of PyTorch and Hugging Face, adapters, GGUF, DeepSpeed and Megatron."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.interop.chat import load_encoder
    from effscale.interop.deepspeed.compression import compression_from_deepspeed
    from effscale.interop.deepspeed.curriculum import curriculum_from_deepspeed
    from effscale.interop.deepspeed.difficulty_index import ranking_from_deepspeed
    from effscale.interop.deepspeed.experts import (
        read_deepspeed_experts,
        read_deepspeed_rest,
        write_deepspeed_experts,
    )
    from effscale.interop.deepspeed.optimizer import optimizer_from_deepspeed
    from effscale.interop.deepspeed.random_ltd import random_ltd_from_deepspeed
    from effscale.interop.generation_config import sampling_from_folder
    from effscale.interop.load import load_pretrained
    from effscale.interop.megatron.checkpoint import load_megatron_moe, save_megatron_moe
    from effscale.interop.packed.folders import load_packed, save_packed
    from effscale.interop.peft.adapters import load_adapter, save_adapter
    from effscale.interop.save import save_pretrained
    from effscale.interop.tensors import FolderError
    from effscale.interop.tokenizer import load_tokenizer

__all__ = [
    "FolderError",
    "compression_from_deepspeed",
    "curriculum_from_deepspeed",
    "load_adapter",
    "load_encoder",
    "load_megatron_moe",
    "load_packed",
    "load_pretrained",
    "load_tokenizer",
    "optimizer_from_deepspeed",
    "random_ltd_from_deepspeed",
    "ranking_from_deepspeed",
    "read_deepspeed_experts",
    "read_deepspeed_rest",
    "sampling_from_folder",
    "save_adapter",
    "save_megatron_moe",
    "save_packed",
    "save_pretrained",
    "write_deepspeed_experts",
]

lazy_package(__name__)
