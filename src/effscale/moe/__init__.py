"""Mixture of experts, as in DeepSpeed-MoE."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.moe.balance import load_balance, with_balance_bias, z_loss
    from effscale.moe.layer import MoEConfig
    from effscale.moe.layouts import upcycle, with_experts
    from effscale.moe.router import RouterConfig
    from effscale.moe.routing import expert_capacity, top_k_routing
    from effscale.moe.students import mixture_of_students_loss, staged_distillation
    from effscale.moe.watch import RouterWatch

__all__ = [
    "MoEConfig",
    "RouterConfig",
    "RouterWatch",
    "expert_capacity",
    "load_balance",
    "mixture_of_students_loss",
    "staged_distillation",
    "top_k_routing",
    "upcycle",
    "with_balance_bias",
    "with_experts",
    "z_loss",
]

lazy_package(__name__)
