"""The models that the experiment ``moe`` compares: which layers have experts, and which model is distilled from which."""

import dataclasses
from typing import Literal

from effscale.models import MLPConfig, TransformerConfig
from effscale.moe import MoEConfig, RouterConfig, with_experts

ArmName = Literal[
    "dense",
    "dense_2x",
    "dense_4x",
    "moe",
    "moe_double",
    "top2",
    "residual",
    "first_half",
    "second_half",
    "pr_moe",
    "pr_moe_student",
    "pr_moe_kd",
    "pr_moe_mos",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """The settings that are specific to an arm."""

    about: str
    """Description of the model in tables and figures."""
    times: int = 1
    """Number of steps, as a multiple of that of the other arms."""
    where: Literal["none", "every_second", "first_half", "second_half", "pyramid"] = "every_second"
    """Which layers have experts.
    A pyramid has twice as many experts in the last sixth of these layers, like 350M+PR-MoE-32/64 in two of twelve."""
    experts: int = 1
    """Number of experts, as a multiple of ``Config.num_experts``."""
    k: int = 1
    """Number of experts per token."""
    residual: bool = False
    """A dense part in addition to the experts."""
    student: bool = False
    """Use fewer layers, ``Config.student_layers``."""
    teacher: ArmName | None = None
    """The arm that it learns from."""
    leaves: bool = False
    """Stop distillation after ``Config.teacher_leaves`` of the steps."""


ARMS: dict[ArmName, Arm] = {
    "dense": Arm(about="dense", where="none"),
    "dense_2x": Arm(about="dense, twice the steps", where="none", times=2),
    "dense_4x": Arm(about="dense, four times the steps", where="none", times=4),
    "moe": Arm(about="experts in every second layer"),
    "moe_double": Arm(about="twice as many experts", experts=2),
    "top2": Arm(about="two experts per token", k=2),
    "residual": Arm(about="one expert and a dense part", residual=True),
    "first_half": Arm(about="experts in the first half", where="first_half"),
    "second_half": Arm(about="experts in the second half", where="second_half"),
    "pr_moe": Arm(about="residual pyramid", where="pyramid", residual=True),
    "pr_moe_student": Arm(
        about="student without a teacher", where="pyramid", residual=True, student=True
    ),
    "pr_moe_kd": Arm(
        about="student, the teacher stays",
        where="pyramid",
        residual=True,
        student=True,
        teacher="pr_moe",
    ),
    "pr_moe_mos": Arm(
        about="student, the teacher leaves",
        where="pyramid",
        residual=True,
        student=True,
        teacher="pr_moe",
        leaves=True,
    ),
}


def expert_counts(arm: Arm, num_layers: int, num_experts: int) -> list[int]:
    """Return the number of experts of each layer; 0 for a dense layer.

    Example:
        >>> expert_counts(ARMS["pr_moe"], 6, 8)
        [0, 8, 0, 8, 0, 16]
        >>> expert_counts(ARMS["second_half"], 6, 8)
        [0, 0, 0, 8, 8, 8]
    """
    counts = [0] * num_layers
    num_experts = num_experts * arm.experts
    if arm.where in ("every_second", "pyramid"):
        places = range(1, num_layers, 2)
        more = max(1, round(len(places) / 6)) if arm.where == "pyramid" else 0
        for number, place in enumerate(places):
            last = number >= len(places) - more
            counts[place] = num_experts * (2 if last else 1)
    elif arm.where != "none":
        half = num_layers // 2
        places = range(half) if arm.where == "first_half" else range(num_layers - half, num_layers)
        for i in places:
            counts[i] = num_experts
    return counts


def with_arm(
    dense: TransformerConfig, arm: Arm, num_experts: int, router: RouterConfig
) -> TransformerConfig:
    """Return the model of an arm, given the dense model with the same number of layers."""
    counts = expert_counts(arm, dense.num_layers, num_experts)
    if not any(counts):
        return dense
    expert = dense.blocks[0].feed_forward
    assert isinstance(expert, MLPConfig)
    moe = MoEConfig(
        num_experts=num_experts,
        expert=expert,
        router=dataclasses.replace(router, k=arm.k),
        shared=expert if arm.residual else None,
    )
    if arm.where in ("every_second", "pyramid"):
        return with_experts(dense, moe, counts[1::2])
    return with_experts(dense, moe, counts, every=1)
