"""Mixture of experts, as in DeepSpeed-MoE."""

from typing import TYPE_CHECKING

from effscale.moe.balance import load_balance, router_statistics, z_loss
from effscale.moe.balance_bias import with_balance_bias
from effscale.moe.expert_choice import ExpertChoice, expert_choice
from effscale.moe.layer import MoE, MoEConfig
from effscale.moe.layouts import with_experts
from effscale.moe.router import Router, RouterConfig
from effscale.moe.routing import Routing, expert_capacity, top_k_routing
from effscale.moe.students import mixture_of_students_loss, staged_distillation
from effscale.moe.upcycling import upcycle
from effscale.moe.watch import RouterWatch, effective_experts

if TYPE_CHECKING:
    from effscale.moe.deepspeed_files import (
        read_deepspeed_experts,
        read_deepspeed_rest,
        write_deepspeed_experts,
    )
    from effscale.moe.megatron import load_megatron_moe, save_megatron_moe

__all__ = [
    "ExpertChoice",
    "MoE",
    "MoEConfig",
    "Router",
    "RouterConfig",
    "RouterWatch",
    "Routing",
    "effective_experts",
    "expert_capacity",
    "expert_choice",
    "load_balance",
    "load_megatron_moe",
    "mixture_of_students_loss",
    "read_deepspeed_experts",
    "read_deepspeed_rest",
    "router_statistics",
    "save_megatron_moe",
    "staged_distillation",
    "top_k_routing",
    "upcycle",
    "with_balance_bias",
    "with_experts",
    "write_deepspeed_experts",
    "z_loss",
]

_FILES = ("read_deepspeed_experts", "read_deepspeed_rest", "write_deepspeed_experts")
_MODELS = ("load_megatron_moe", "save_megatron_moe")


def __getattr__(name: str):
    # These import effscale.interop and tokenizers, which only reading and writing files need.
    if name in _FILES:
        from effscale.moe import deepspeed_files

        return getattr(deepspeed_files, name)
    if name in _MODELS:
        from effscale.moe import megatron

        return getattr(megatron, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
