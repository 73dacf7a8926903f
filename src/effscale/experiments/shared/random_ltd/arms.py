"""Shared by the experiments ``random_ltd_vit`` and ``random_ltd_bert``: two arms with the same number of steps, one with random-LTD."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import optax

from effscale.curriculum import current_learning_rate, steps_then_tokens, with_metrics
from effscale.ltd import (
    RandomLTD,
    dropping_layers,
    layer_token_average,
    mslg,
    training_flops,
)
from effscale.models import TransformerConfig
from effscale.models.validation import check, check_finite
from effscale.training import (
    AdamWConfig,
    Clip,
    Loss,
    StagedStep,
    Stages,
    TrainState,
    make_train_step,
)

ArmName = Literal["baseline", "random_ltd"]
ARMS: tuple[ArmName, ...] = ("baseline", "random_ltd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropping:
    """Schedule of random-LTD; all layers except the first and the last drop tokens."""

    min_value: int
    """Number of tokens per row that are kept at first; after the fraction ``share`` of the steps, all are."""
    seq_per_step: int
    """Granularity of the number of kept tokens; each number costs a compilation."""
    share: float
    """Fraction of the steps after which all tokens are kept. With 1, this would be after the last step, so no step keeps all tokens."""

    def __post_init__(self):
        check_finite(self)
        check(self, self.min_value >= 1, "min_value", "at least 1")
        check(self, self.seq_per_step >= 1, "seq_per_step", "at least 1")
        check(self, 0 < self.share <= 1, "share", "above 0 and at most 1")

    def build(self, length: int, num_steps: int) -> RandomLTD:
        """Return the technique for rows of ``length`` tokens in a run of ``num_steps`` steps."""
        check(self, self.min_value <= length, "min_value", f"at most the {length} tokens of a row")
        pacing = mslg(
            min_value=self.min_value,
            max_value=length,
            require_steps=max(1, round(self.share * num_steps)),
            seq_per_step=self.seq_per_step,
        )
        return RandomLTD(pacing=pacing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A linear warmup by steps, then a linear decay by the tokens that a layer consumes on average.

    Both arms have the same warmup. A warmup counted in layer tokens would take more steps with random-LTD, whose
    first steps consume few of them, and the arms would differ in more than the dropped tokens.
    """

    peak: float
    """Peak learning rate."""
    warmup: int
    """Warmup steps."""
    final: float = 0.0
    """Final learning rate."""

    def build(self, total: int) -> optax.GradientTransformationExtraArgs:
        """Return the last transformation of the optimizer, for a run in which a layer consumes ``total`` tokens on
        average.

        Its values are part of the optimizer's state, so one compiled step works for all of them.
        """
        return optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
            kind="linear",
            peak=self.peak,
            warmup_steps=self.warmup,
            total_tokens=float(total),
            final=self.final,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the two arms: the tokens it keeps at each step, and their theoretical cost.

    The arms differ only in the schedule: the baseline keeps all tokens from the first step.

    Example:
        A quarter of the tokens is kept in two of four layers, for half of the run.

        >>> from effscale.models import gpt2
        >>> model = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> dropping = Dropping(min_value=2, seq_per_step=8, share=0.5)
        >>> arm = Arm(name="random_ltd", model=model, dropping=dropping, length=8, batch_size=1, num_steps=10)
        >>> arm.stages, arm.total_layer_tokens
        (Stages(starts=(0, 5), values=(2, 8)), 65)
    """

    name: ArmName
    """Name of the arm."""
    model: TransformerConfig
    """Config of the model."""
    dropping: Dropping
    """Schedule of random-LTD; the figures of the baseline are of the same layers."""
    length: int
    """Tokens per row."""
    batch_size: int
    """Rows per batch."""
    num_steps: int
    """Number of steps of a run."""

    def __post_init__(self):
        self.ltd.check(self.model, self.length)

    @property
    def ltd(self) -> RandomLTD:
        """Return the technique."""
        return self.dropping.build(self.length, self.num_steps)

    @functools.cached_property
    def stages(self) -> Stages[int]:
        """Kept tokens by step, only for the run's steps."""
        if self.name == "baseline":
            return Stages((0,), (self.length,))
        whole = self.ltd.stages()
        begun = sum(start < self.num_steps for start in whole.starts)
        return Stages(whole.starts[:begun], whole.values[:begun])

    def layer_tokens(self, kept: int) -> int:
        """Return the tokens that a layer consumes in a step, on average over layers."""
        layers, dropping = self.model.num_layers, len(dropping_layers(self.model))
        return self.batch_size * layer_token_average(self.length, kept, layers, dropping)

    def flops(self, kept: int) -> int:
        """Return the floating-point operations of a step."""
        return self.batch_size * training_flops(self.model, self.length, kept)

    @property
    def total_layer_tokens(self) -> int:
        """Layer tokens of a run."""
        return self.stages.total(self.num_steps, self.layer_tokens)

    @property
    def total_flops(self) -> int:
        """Operations of a run."""
        return self.stages.total(self.num_steps, self.flops)

    def optimizer(
        self, rate: LearningRate, adamw: AdamWConfig
    ) -> optax.GradientTransformationExtraArgs:
        """Create AdamW with a learning rate that decays by this arm's layer tokens."""
        return adamw.build(rate.build(self.total_layer_tokens))

    def train_step(
        self,
        loss_fn: Callable[..., Loss],
        optimizer: optax.GradientTransformation,
        *,
        clip_norm: float,
        accumulate: int = 1,
    ) -> Callable[[TrainState, Any], Any]:
        """Create the training step, for ``staged``. It reports the learning rate.

        Args:
            loss_fn: The loss; it accepts ``run_group``.
            optimizer: From ``optimizer``. A state that was created with another learning rate keeps it.
            clip_norm: Maximum norm of the gradient.
            accumulate: Micro-batches per batch.
        """
        step = make_train_step(
            self.ltd.loss(loss_fn),
            optimizer,
            accumulate=accumulate,
            clip=Clip(clip_norm),
            tokens_per_batch=self.ltd.tokens_per_batch(self.model),
        )
        return with_metrics(step, lambda state: current_learning_rate(state.opt_state))

    def shape_batch(self, batch: Any, kept: int) -> Any:
        """Return the batch in the shape of a step that keeps ``kept`` tokens."""
        return batch if self.name == "baseline" else self.ltd.shape_batch(batch, kept)

    def staged(self, step: Callable[[TrainState, Any], Any]) -> StagedStep:
        """Return the training step with the arm's schedule."""
        return StagedStep(step, self.stages, self.shape_batch)
