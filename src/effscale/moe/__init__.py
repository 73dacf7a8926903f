"""Mixture of experts, as in DeepSpeed-MoE."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.moe.balance import load_balance, router_statistics, with_balance_bias, z_loss
    from effscale.moe.layer import MoE, MoEConfig
    from effscale.moe.layouts import upcycle, with_experts
    from effscale.moe.router import Router, RouterConfig
    from effscale.moe.routing import (
        ExpertChoice,
        Routing,
        expert_capacity,
        expert_choice,
        top_k_routing,
    )
    from effscale.moe.students import leaving_teacher, mixture_of_students_loss, staged_distillation
    from effscale.moe.watch import RouterWatch, effective_experts

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
    "leaving_teacher",
    "load_balance",
    "mixture_of_students_loss",
    "router_statistics",
    "staged_distillation",
    "top_k_routing",
    "upcycle",
    "with_balance_bias",
    "with_experts",
    "z_loss",
]

lazy_package(__name__)
