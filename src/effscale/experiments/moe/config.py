"""Config and presets of the experiment ``moe``."""

import dataclasses
from typing import get_args

from effscale.experiments.moe.arms import ARMS, ArmName, with_arm
from effscale.experiments.shared.config_parts import OUTPUT, CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.models import TransformerConfig
from effscale.models.validation import check
from effscale.moe import RouterConfig
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CorporaPart):
    """Options of a run; every field is a command-line option."""

    arms: tuple[ArmName, ...] = tuple(name for name in get_args(ArmName) if name != "dense_4x")
    """Models to train; a student needs its teacher, pr_moe. dense_4x is for mixtures whose loss dense_2x does not reach."""
    seeds: int = 3
    """Number of runs per arm. Seeds 0, 1, ... decide the initial weights, the order of rows, and which tokens get a place in an expert."""
    steps: int = 600
    """Optimizer steps; dense_2x and dense_4x take two and four times as many."""
    length: int = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: int = 16
    """Rows per batch."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into, to save memory; expert capacity is shared by the tokens of each micro-batch."""
    model: ModelConfig = ModelConfig(num_layers=6, d_model=96, remat="none")
    """The dense model; each expert has the size of its feed-forward."""
    num_experts: int = 8
    """Experts per layer with experts; the last such layers of a pyramid have twice as many."""
    router: RouterConfig = RouterConfig(capacity_factor=1.25, eval_capacity_factor=2.0)
    """The router; ``k`` is set by each arm."""
    student_layers: int = 4
    """Number of layers of the students."""
    teacher_leaves: float = 0.7
    """Fraction of the steps after which pr_moe_mos trains without its teacher; in the paper, about 400,000 of 570,000."""
    alpha: float = 1.0
    """Weight of the distillation loss relative to the text loss."""
    temperature: float = 1.0
    """Temperature of the distillation loss."""
    dense_rate: float = 8e-3
    """Peak learning rate of dense models: the best of 2e-3, 4e-3, ... on the first seed."""
    moe_rate: float = 4e-3
    """Peak learning rate of models with experts, found in the same way."""
    warmup: int = 60
    """Warmup steps, the same for all arms; then the learning rate decays along a cosine to a tenth."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.95, weight_decay=0.1)
    """AdamW options."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are clipped."""
    vocab_size: int = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus."""
    eval_every: int = 100
    """Steps between evaluations on part of the held-out text, and between checkpoints; the last evaluation is on all of it."""
    eval_batches: int = 20
    """Number of batches in that part."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.arms) >= 1, "arms", "at least one arm")
        check(self, len(set(self.arms)) == len(self.arms), "arms", "different arms")
        for name in self.arms:
            teacher = ARMS[name].teacher
            there = teacher is None or teacher in self.arms
            check(self, there, "arms", f"arms that include {teacher}, the teacher of {name}")
        for name in (
            "seeds",
            "steps",
            "length",
            "batch_size",
            "accumulate",
            "eval_every",
            "eval_batches",
        ):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, 0 <= self.warmup < self.steps, "warmup", f"below steps={self.steps}")
        check(self, self.num_experts >= 2, "num_experts", "at least 2")
        check(self, self.model.num_layers >= 2, "model", "a model with at least 2 layers")
        fewer = 2 <= self.student_layers <= self.model.num_layers
        check(self, fewer, "student_layers", f"from 2 to num_layers={self.model.num_layers}")
        check(self, 0 < self.teacher_leaves < 1, "teacher_leaves", "between 0 and 1")
        for name in ("alpha", "temperature", "dense_rate", "moe_rate", "clip_norm"):
            check(self, getattr(self, name) > 0, name, "above 0")
        for name in self.arms:
            self.transformer(name, self.vocab_size)  # raises for an invalid model

    def steps_of(self, name: ArmName) -> int:
        """Return the number of steps of an arm."""
        return self.steps * ARMS[name].times

    def teacher_stop(self, name: ArmName) -> int:
        """Return the number of steps after which an arm trains without its teacher."""
        return max(1, round(self.teacher_leaves * self.steps_of(name)))

    def rate_of(self, name: ArmName) -> float:
        """Return the peak learning rate of an arm."""
        return self.dense_rate if ARMS[name].where == "none" else self.moe_rate

    def transformer(self, name: ArmName, vocab_size: int) -> TransformerConfig:
        """Return the model of an arm."""
        arm = ARMS[name]
        model = self.model
        if arm.student:
            model = dataclasses.replace(model, num_layers=self.student_layers)
        dense = model.build(vocab_size, self.length)
        return with_arm(dense, arm, self.num_experts, self.router)


PRESETS = {
    "smoke": Config(
        arms=("dense", "moe", "pr_moe", "pr_moe_mos"),
        seeds=1,
        steps=20,
        warmup=2,
        length=32,
        batch_size=8,
        model=ModelConfig(num_layers=2, d_model=32, num_heads=2, remat="none"),
        num_experts=4,
        student_layers=2,
        eval_every=10,
        eval_batches=2,
    ),
    "default": Config(),
    # 350M+PR-MoE-32/64 and its baselines, from DeepSpeed's scripts: 24 layers, width 1,024, 256 rows of 2,048 tokens,
    # 300B tokens, capacity factor 1. Students have 21 layers. Their learning rates end at 1e-6, here at a tenth of
    # the peak.
    "paper": Config(
        steps=572_000,
        warmup=715,
        length=2048,
        batch_size=256,
        accumulate=8,
        model=ModelConfig(
            num_layers=24,
            d_model=1024,
            num_heads=16,
            dtype="bfloat16",
            remat="full",
            init_std=0.014,
        ),
        num_experts=32,
        router=RouterConfig(),
        student_layers=21,
        dense_rate=3e-4,
        moe_rate=3e-4,
        vocab_size=50257,
        eval_every=5000,
    ),
}

FREE = ("arms", "seeds", *OUTPUT, "cache")
"""Fields that can change when a run is resumed."""
