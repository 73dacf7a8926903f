"""Shared by ``random_ltd_vit`` and ``random_ltd_bert``: what two arms with the same number of steps see, one with random-LTD."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated

import optax

from effscale.curriculum import current_learning_rate, steps_then_tokens
from effscale.ltd import RandomLTD, layer_token_average, mslg, training_flops
from effscale.ltd.layers import dropping_layers
from effscale.models import TransformerConfig
from effscale.options import Bounds, Options, PositiveInt, check
from effscale.run import Run
from effscale.study import Results
from effscale.training import AdamWConfig, Stages
from effscale.training.staged import Changes

ARMS = {"baseline": "baseline", "random_ltd": "random-LTD"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropping(Options):
    """Schedule of random-LTD; all layers except the first and the last drop tokens."""

    min_value: PositiveInt
    """Number of tokens per row that are kept at first; after the fraction ``share`` of the steps, all are."""
    seq_per_step: PositiveInt
    """Granularity of the number of kept tokens; each number costs a compilation."""
    share: Annotated[float, Bounds(above=0, at_most=1)]
    """Fraction of the steps after which all tokens are kept. With 1, this would be after the last step, so no step keeps all tokens."""

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
class Plan:
    """The tokens that the layers of an arm process. The baseline keeps all of them from the first step.

    Example:
        A quarter of the tokens is kept in two of four layers, for half of the run.

        >>> from effscale.models import gpt2
        >>> model = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> dropping = Dropping(min_value=2, seq_per_step=8, share=0.5)
        >>> plan = Plan(arm="random_ltd", model=model, dropping=dropping, length=8, batch_size=1, num_steps=10)
        >>> plan.stages, plan.layer_tokens
        (Stages(starts=(0, 5), values=(2, 8)), 65)
    """

    arm: str
    """Name of the arm: baseline or random_ltd."""
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
        """The technique."""
        return self.dropping.build(self.length, self.num_steps)

    @functools.cached_property
    def stages(self) -> Stages[int]:
        """Kept tokens by step, only for the run's steps."""
        if self.arm == "baseline":
            return Stages((0,), (self.length,))
        whole = self.ltd.stages()
        begun = sum(start < self.num_steps for start in whole.starts)
        return Stages(whole.starts[:begun], whole.values[:begun])

    @property
    def layer_tokens(self) -> int:
        """Tokens that a layer processes in a run, on average over layers."""
        layers, dropping = self.model.num_layers, len(dropping_layers(self.model))
        return self._total(lambda kept: layer_token_average(self.length, kept, layers, dropping))

    @property
    def teraflops(self) -> float:
        """Theoretical operations of the matrix products of a run, in 10^12."""
        return self._total(lambda kept: training_flops(self.model, self.length, kept)) / 1e12

    def _total(self, cost: Callable[[int], int]) -> int:
        return self.batch_size * self.stages.total(self.num_steps, cost)

    def rate(self, peak: float, warmup: int, final: float = 0.0) -> dict[str, float | int]:
        """Return the options of the learning rate: a linear warmup by steps, the same for both arms, then a linear decay by
        layer tokens.

        A warmup by layer tokens would take more steps with random-LTD, whose first steps consume few of them, and the
        arms would differ in more than the dropped tokens.
        """
        total = float(self.layer_tokens)
        return {"peak": peak, "warmup_steps": warmup, "total_tokens": total, "final": final}

    def run(self, run: Run, adamw: AdamWConfig, rate: dict[str, float | int]) -> Run:
        """Return a run with this arm's steps, tokens and learning rate, whose values are part of the optimizer's state."""
        schedule = optax.inject_hyperparams(steps_then_tokens, static_args="kind")
        drops = self.arm != "baseline"
        return dataclasses.replace(
            run,
            num_steps=self.num_steps,
            loss=self.ltd.loss(run.loss) if drops else run.loss,
            tokens_per_batch=self.ltd.tokens_per_batch(self.model),
            changes=Changes(self.stages, self.ltd.shape_batch) if drops else None,
            optimizer=adamw.build(schedule(kind="linear", **rate)),
            reports=lambda state: current_learning_rate(state.opt_state),
        )

    @property
    def costs(self) -> dict[str, float | int]:
        """The theoretical costs, as metrics of a trial."""
        return {"layer_tokens": self.layer_tokens, "teraflops": self.teraflops}


COLUMNS = {"layer_tokens": "layer tokens", "teraflops": "teraFLOPs", "step_seconds": "seconds"}


def compared(results: Results, *metrics: str) -> dict[str, float | None]:
    """Return how much random-LTD changes each metric, and the share of each cost that it saves."""
    if not ARMS.keys() <= results.study.arms.keys():
        return {}
    table = results.table
    named = {f"{m}_difference": table.difference("random_ltd", "baseline", m).mean for m in metrics}
    for cost in COLUMNS:
        before, after = (table.interval(arm, cost).mean for arm in ARMS)
        named[f"{cost}_saved"] = 1 - after / before
    return {name: None if math.isnan(value) else value for name, value in named.items()}
