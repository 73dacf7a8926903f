"""Learning rates as functions of the number of updates or of tokens seen, and the default optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effscale.options import (
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    ProperFraction,
    check,
    is_finite,
)
from effscale.training.partition import decay_mask

Unit = Literal["steps", "tokens"]
Kind = Literal["constant", "linear", "cosine", "inverse_sqrt"]


@dataclasses.dataclass(frozen=True)
class Schedule(Options):
    """A schedule: a function of a count, with the unit of the count.

    Attributes:
        function: Maps the count to a value; any optax schedule works.
        unit: ``steps``: the number of updates, as optax counts them. ``tokens``: the tokens seen before the step.
    """

    function: Callable[[Any], Any]
    unit: Unit = "steps"

    def __call__(self, count: Any) -> Any:
        """Return the value at ``count``."""
        return self.function(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Options):
    r"""A linear warmup from zero to ``peak``, followed by a decay.

    With progress $p = (t - \text{warmup}) / (\text{total} - \text{warmup})$ in [0, 1]:
    ``linear`` falls as $1 - p$ and ``cosine`` as $(1 + \cos \pi p)/2$, both from ``peak`` to ``final``;
    ``inverse_sqrt`` is $\text{peak} \sqrt{\max(\text{warmup}, 1) / t}$, never under ``final``;
    ``constant`` stays at ``peak``.

    >>> schedule = ScheduleConfig(kind="cosine", peak=1.0, warmup=10, total=110, final=0.1).build()
    >>> [round(float(schedule(t)), 4) for t in (0, 5, 10, 60, 110, 500)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """

    kind: Kind = "cosine"
    """The shape of the decay."""
    peak: NonNegativeFloat = 1e-3
    """The value at the end of the warmup."""
    warmup: NonNegativeInt = 0
    """The length of the warmup, in ``unit``."""
    total: int | None = None
    """The end of the decay, in ``unit`` and including the warmup; required for linear and cosine."""
    final: NonNegativeFloat = 0.0
    """The value at the end of the decay."""
    unit: Unit = "steps"
    """Count updates (``steps``) or ``tokens``. If the batch size changes, as with curricula, count tokens."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.final <= self.peak, "final", f"from 0 to peak={self.peak}")
        if self.kind in ("linear", "cosine"):
            ends = self.total is not None and self.total > self.warmup
            wanted = f"the count at which kind={self.kind!r} ends, above warmup={self.warmup}"
            check(self, ends, "total", wanted)

    def build(self) -> Schedule:
        """Build the schedule. Its function accepts integers or floats, traced or not."""
        # Billions of tokens do not fit into 32 bits.
        warmup, total = float(self.warmup), None if self.total is None else float(self.total)

        def value(count: Any) -> jax.Array:
            count = jnp.asarray(count, jnp.float32)
            rising = jnp.minimum(count / warmup, 1.0) if warmup else jnp.ones_like(count)
            later = decayed(
                self.kind, count, start=warmup, total=total, peak=self.peak, final=self.final
            )
            return jnp.where(count < warmup, self.peak * rising, later)

        return Schedule(value, self.unit)


def decayed(
    kind: Kind,
    count: jax.Array,
    *,
    start: float | jax.Array,
    total: float | jax.Array | None,
    peak: float | jax.Array,
    final: float | jax.Array,
) -> jax.Array:
    """Return the value of a decay that begins at the count ``start`` and ends at ``total``, as in ``ScheduleConfig``.

    >>> float(decayed("linear", jnp.float32(15), start=10.0, total=20.0, peak=1.0, final=0.5))
    0.75
    """
    if kind == "constant":
        return jnp.full_like(count, peak)
    if kind == "inverse_sqrt":
        start = jnp.maximum(start, 1.0)
        return jnp.maximum(peak * jnp.sqrt(start / jnp.maximum(count, start)), final)
    assert total is not None
    progress = jnp.clip((count - start) / jnp.maximum(total - start, 1.0), 0.0, 1.0)
    shape = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return final + (peak - final) * shape


def by_tokens(schedule: Callable[[Any], Any], tokens_per_step: int | None = None) -> Schedule:
    """Make a schedule count tokens seen.

    Args:
        schedule: Any schedule. Without ``tokens_per_step`` its argument is the number of tokens.
        tokens_per_step: The number of tokens equivalent to one step of the schedule. With it, a schedule tuned in steps of
            full batches keeps its meaning when a curriculum makes some batches smaller.

    >>> schedule = by_tokens(optax.linear_schedule(1.0, 0.0, 100), tokens_per_step=1024)
    >>> float(schedule(jnp.float32(50 * 1024)))
    0.5
    """
    if tokens_per_step is None:
        return Schedule(schedule, "tokens")
    if not is_finite(tokens_per_step) or tokens_per_step < 1:
        raise ValueError(f"tokens_per_step must be at least 1 and finite, got {tokens_per_step!r}")
    return Schedule(
        lambda tokens: schedule(jnp.asarray(tokens, jnp.float32) / tokens_per_step), "tokens"
    )


def value_at(schedule: float | jax.Array | Callable[[Any], Any], count: Any, tokens: Any) -> Any:
    """Evaluate a learning rate in float32: a number, or the value of a schedule at the number of updates or tokens, by its unit.

    Raises:
        ValueError: The schedule counts tokens and ``tokens`` is None.

    >>> float(value_at(by_tokens(lambda tokens: tokens / 10), 3, jnp.float32(5.0)))
    0.5
    """
    if isinstance(schedule, Schedule) and schedule.unit == "tokens":
        if tokens is None:
            raise ValueError(
                "a schedule that counts tokens needs optimizer.update(..., tokens=tokens_seen)"
            )
        return jnp.asarray(schedule(tokens), jnp.float32)
    return jnp.asarray(schedule(count) if callable(schedule) else schedule, jnp.float32)


def scale_by_token_schedule(
    schedule: Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by ``-schedule(tokens)``, with ``tokens`` passed to ``update`` as an extra argument.

    DeepSpeed and BLOOM schedule the learning rate by samples or tokens consumed. If the batch size changes, this
    is not a function of the number of updates. The state is empty, as the train state counts the tokens.

    Args:
        schedule: A function from tokens seen (float32) to a learning rate.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs ``tokens=``.

    >>> transform = scale_by_token_schedule(lambda tokens: tokens / 10)
    >>> transform.update(jnp.ones(1), transform.init(jnp.ones(1)), tokens=jnp.float32(5.0))[0].tolist()
    [-0.5]
    """

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, tokens: Any = None, **extra: Any
    ) -> Any:
        del params, extra
        rate = -value_at(Schedule(schedule, "tokens"), None, tokens)
        return jax.tree.map(lambda u: u * rate.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_learning_rate(
    learning_rate: float | jax.Array | Callable[[Any], Any] | optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Return the final transformation of an optimizer, which applies the learning rate.

    The learning rate is a number, an optax schedule (counts updates), a ``Schedule`` or the transformation itself.

    Raises:
        ValueError: ``learning_rate`` is a number that is not finite, or none of these.
    """
    if isinstance(learning_rate, optax.GradientTransformation):
        return learning_rate
    is_array = isinstance(learning_rate, jax.Array | np.ndarray)
    if not (is_array or callable(learning_rate) or is_finite(learning_rate)):
        raise ValueError(
            f"learning_rate must be a finite number, a schedule or an optax transformation, got {learning_rate!r}"
        )
    if isinstance(learning_rate, Schedule) and learning_rate.unit == "tokens":
        return scale_by_token_schedule(learning_rate.function)
    return optax.scale_by_learning_rate(learning_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(Options):
    """AdamW as in ``optax.adamw``, with weight decay only on matrices.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), ICLR. https://arxiv.org/abs/1711.05101

    >>> optimizer = AdamWConfig(weight_decay=0.1).build(1e-3)
    """

    b1: ProperFraction = 0.9
    """Decay of the first moment."""
    b2: ProperFraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Number added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""

    def build(
        self,
        learning_rate: float | Callable[[Any], Any] | optax.GradientTransformation,
        mask: Callable[[Any], Any] | None = decay_mask,
    ) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer.

        Args:
            learning_rate: A number, an optax schedule, a ``Schedule`` (which can count tokens), or the final transformation,
                such as ``effscale.curriculum.steps_then_tokens``.
            mask: A function from the trained leaves to a tree of bools, True where weight decay applies; None decays everything.

        Returns:
            An optax transformation that accepts extra arguments.

        Raises:
            ValueError: ``learning_rate`` is a number that is not finite, or none of the above.
        """
        return optax.chain(
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask),
            scale_by_learning_rate(learning_rate),
        )
