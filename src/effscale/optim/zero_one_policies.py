"""The two policies of 0/1 Adam: when to update the variance, and when to synchronize the workers."""

import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effscale.optim.moments import check_count


class Round(enum.IntEnum):
    """The kind of a step of 0/1 Adam, by what it sends."""

    VARIANCE = 0
    """Uncompressed gradients; the variance is updated."""
    GRADIENT = 1
    """Gradients in one bit."""
    LOCAL = 2
    """Nothing: each worker makes a local step."""
    SYNC = 3
    """The workers' local progress since the last synchronization, in one bit."""


class PoliciesState(NamedTuple):
    """The counters of both policies: int32 scalars and a bool.

    Attributes:
        var_interval: Steps between updates of the variance.
        var_counter: Updates of the variance since that interval was doubled.
        local_step_interval: Steps between synchronizations.
        local_step_counter: Steps since that interval was doubled.
        var_age: Steps since the last update of the variance, including the next step.
        local: Whether local steps have begun.
    """

    var_interval: Any
    var_counter: Any
    local_step_interval: Any
    local_step_counter: Any
    var_age: Any
    local: Any


class Policies(NamedTuple):
    r"""The options of both policies, under DeepSpeed's names.

    The steps are numbered t = 1, 2, ... Up to ``var_freeze_step``, the steps whose t is a multiple of the variance
    interval update the variance. The interval is 1 and doubles after every ``var_update_scaler`` updates. Later, the
    steps whose t is a multiple of the local interval synchronize. It is 1 and doubles every ``local_step_scaler`` steps, up
    to ``local_step_clipper``.
    """

    var_freeze_step: Any = 100_000
    var_update_scaler: Any = 16
    local_step_scaler: Any = 32_678
    local_step_clipper: Any = 16

    def check(self) -> None:
        """Raise a ``ValueError`` for options out of range."""
        for name, value in self._asdict().items():
            check_count(name, value, 0 if name == "var_freeze_step" else 1)

    def init(self) -> PoliciesState:
        """Return the counters before the first step."""
        # A separate array for each, as a donated state must not contain an array twice.
        counters = (jnp.full((), value, jnp.int32) for value in (1, 0, 1, 0, 1))
        return PoliciesState(*counters, local=jnp.zeros((), jnp.bool_))

    def step(self, state: PoliciesState, count: Any) -> tuple[jax.Array, PoliciesState]:
        """Return the `Round` of the step after ``count`` others, and the counters after it."""
        t = count + 1
        # There is no way back, even if a run resumes with a larger var_freeze_step.
        first_stage = (t <= self.var_freeze_step) & ~state.local
        variance = first_stage & (t % state.var_interval == 0)
        sync = ~first_stage & (t % state.local_step_interval == 0)
        kind = jnp.where(
            first_stage,
            jnp.where(variance, int(Round.VARIANCE), int(Round.GRADIENT)),
            jnp.where(sync, int(Round.SYNC), int(Round.LOCAL)),
        )
        var_counter = state.var_counter + variance.astype(jnp.int32)
        var_full = var_counter >= self.var_update_scaler
        local_counter = state.local_step_counter + (~first_stage).astype(jnp.int32)
        local_full = local_counter >= self.local_step_scaler
        largest = 2**30  # doubling stays within int32
        return kind, PoliciesState(
            var_interval=_doubled(state.var_interval, var_full, largest),
            var_counter=jnp.where(var_full, 0, var_counter),
            local_step_interval=_doubled(
                state.local_step_interval, local_full, self.local_step_clipper
            ),
            local_step_counter=jnp.where(local_full, 0, local_counter),
            var_age=jnp.where(variance, 1, state.var_age + 1),
            local=~first_stage,
        )

    def rounds(self, steps: int) -> np.ndarray:
        """Return the `Round` of each of the first steps, int32.

        >>> Policies(var_freeze_step=4, var_update_scaler=1, local_step_scaler=2, local_step_clipper=2).rounds(10).tolist()
        [0, 0, 1, 0, 3, 3, 2, 3, 2, 3]
        """
        self.check()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")

        def body(state: PoliciesState, count: jax.Array) -> tuple[PoliciesState, jax.Array]:
            kind, state = self.step(state, count)
            return state, kind

        return np.asarray(jax.lax.scan(body, self.init(), jnp.arange(steps, dtype=jnp.int32))[1])


def _doubled(interval: jax.Array, when: jax.Array, largest: Any) -> jax.Array:
    doubled = jnp.minimum(interval * 2, largest).astype(interval.dtype)
    return jnp.where(when, doubled, interval)


def halving_steps(decay: float, every: int) -> int:
    """Return the number of steps in which a decaying learning rate halves, the paper's rule for ``local_step_scaler``.

    The learning rate is multiplied by ``decay`` every ``every`` steps.

    >>> halving_steps(0.99, 520)
    35863
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}")
    return round(every * math.log(0.5) / math.log(decay))
