"""Config of pretraining a GPT with a technique: ``quickstart`` runs it once, ``data_efficiency`` many times."""

import dataclasses
import pathlib

import optax

from effscale.command.folder import OUTPUT
from effscale.data_efficiency import (
    CURRICULA,
    DataEfficiencyConfig,
    Plan,
    Technique,
    check_technique,
    make_plan,
)
from effscale.experiments.shared.config_parts import CorporaPart, TextPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.options import check, is_integer
from effscale.parallel import MeshConfig
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingPart(TextPart):
    """Fields that are the same for all compared runs."""

    tokenizer: pathlib.Path | None = None
    """A tokenizer.json or its folder, to use instead of training a tokenizer."""
    length: int = 256
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: int = 16
    """Rows per batch, over all devices."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """Schedules of the technique."""
    model: ModelConfig = ModelConfig()
    """The model."""
    final_learning_rate: float | None = None
    """Final learning rate; None uses a tenth of the peak."""
    optimizer: AdamWConfig = AdamWConfig()
    """AdamW options."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are clipped."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh: the size of each axis; -1 means all remaining devices."""
    checkpoint_every: int = 60
    """Steps between checkpoints."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "batch_size", "accumulate", "checkpoint_every"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, self.clip_norm > 0, "clip_norm", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig(CorporaPart, PretrainingPart):
    """Config of one run."""

    steps: int = 240
    """Optimizer steps. A technique takes more steps with smaller batches, with the same number of layer-averaged tokens."""
    technique: Technique = "none"
    """Curriculum learning (cl: rows of frequent tokens and short rows first), random-LTD (ltd: middle layers process only some of the tokens) or both."""
    learning_rate: float = 3e-3
    """Peak learning rate: a linear warmup by steps, then a cosine by tokens."""
    warmup: int = 30
    """Warmup steps, whatever the size of their batches."""
    eval_every: int = 60
    """Steps between evaluations on part of the held-out text, reported as part_val_loss; val_loss at the end is on all of it."""
    eval_batches: int = 6
    """Number of batches in that part."""
    keep: int = 3
    """Number of checkpoints to keep."""
    seed: int = 0
    """Seed of the split, the order of data, the initial weights and the samples."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint, exactly as if it had not stopped."""

    def __post_init__(self):
        super().__post_init__()
        check(self, is_integer(self.seed) and self.seed >= 0, "seed", "an integer, 0 or above")
        for name in ("steps", "eval_every", "eval_batches", "keep"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        # Raises for an invalid model or technique.
        model = self.model.build(self.vocab_size, self.length)
        check_technique(
            self.technique, self.efficiency, model, steps=self.steps, length=self.length
        )
        if self.technique in CURRICULA:
            wanted = "a single source, because a curriculum orders the rows of one source"
            check(self, len(self.corpus) == 1, "corpus", wanted)
        check(self, 0 <= self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        check(self, self.learning_rate > 0, "learning_rate", "above 0, and finite")
        final = self.final_learning_rate
        below = f"from 0 to learning_rate={self.learning_rate}, or None"
        within = final is None or 0 <= final <= self.learning_rate
        check(self, within, "final_learning_rate", below)

    def schedule(self) -> optax.GradientTransformationExtraArgs:
        """Return the learning rate, the last transformation of the optimizer: it warms up by steps and decays by
        layer-averaged tokens.

        Its values are part of the optimizer's state, so one compiled step works for all of them.
        """
        from effscale.curriculum import steps_then_tokens

        final = self.final_learning_rate
        return optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
            peak=self.learning_rate,
            warmup_steps=self.warmup,
            total_tokens=float(self.steps * self.batch_size * self.length),
            final=self.learning_rate / 10 if final is None else final,
        )

    def plan(self, vocab_size: int) -> Plan:
        """Return the shapes of the run and its number of steps."""
        return make_plan(
            self.technique,
            self.efficiency,
            self.model.build(vocab_size, self.length),
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
        )


FREE = (*OUTPUT, "cache", "eval_every", "eval_batches", "checkpoint_every", "keep", "mesh")
"""Fields that can change when a run is resumed."""
