"""The learning rate for batches of changing length: warmup by steps, decay by tokens."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from effscale.training import ScheduleConfig
from effscale.training.schedules import decayed

Decay = Literal["linear", "cosine", "inverse_sqrt"]


class StepsThenTokensState(NamedTuple):
    """The state of the schedule.

    Attributes:
        count: The number of updates, int32.
        origin: The tokens seen at the end of the warmup, where the decay starts, float32.
        learning_rate: The learning rate of the last update, float32.
    """

    count: Any
    origin: Any
    learning_rate: Any


def steps_then_tokens(
    *,
    peak: float | jax.Array,
    warmup_steps: int | jax.Array,
    total_tokens: int | float | jax.Array,
    kind: Decay = "cosine",
    final: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply updates by a negative learning rate that warms up by steps and decays by tokens.

    After $n$ updates and $x$ tokens, with a warmup of $w$ updates, at whose end $x_w$ tokens had
    been seen, and a total of $D$ tokens:

    $$
    \eta = \text{peak} \cdot n/w \quad (n \le w), \qquad
    p = (x - x_w)/(D - x_w) \quad (n > w)
    $$

    where ``linear`` falls as $1 - p$ and ``cosine`` as $(1 + \cos \pi p)/2$, both from ``peak`` to ``final``;
    ``inverse_sqrt`` is $\text{peak} \sqrt{x_w/x}$. Beyond $D$ tokens it is ``final``.

    With a sequence-length curriculum the first steps have few tokens: a warmup by tokens would take too long, and a decay
    by steps would come too early. The token count at the end of the warmup is recorded when it is reached, so it is right for
    any schedule of lengths.

    The numbers can be scalar arrays, so ``optax.inject_hyperparams(steps_then_tokens, static_args="kind")`` keeps them in
    the optimizer's state: one compiled step then works for every peak and warmup of a search.

    Args:
        peak: The learning rate at the end of the warmup.
        warmup_steps: The number of warmup updates.
        total_tokens: The number of tokens of the run, including the warmup.
        kind: The shape of the decay.
        final: The learning rate at the end.

    Returns:
        The final transformation of an optimizer. Its ``update`` needs ``tokens=``, the tokens seen before the step, which
        ``make_train_step`` passes.

    Raises:
        ValueError: An argument is out of range.

    References:
        Li et al., "The Stability-Efficiency Dilemma" (2021), section 4; the rule is that of Megatron-DeepSpeed.
            https://arxiv.org/abs/2108.06084

    Example:
        >>> optimizer = optax.chain(
        ...     optax.scale_by_adam(), steps_then_tokens(peak=1e-3, warmup_steps=100, total_tokens=1_000_000))
    """
    if kind not in get_args(Decay):
        raise ValueError(f"kind must be one of {', '.join(get_args(Decay))}, got {kind!r}")
    if not any(isinstance(x, jax.Array) for x in (peak, warmup_steps, total_tokens, final)):
        _check(peak, warmup_steps, total_tokens, final)
        total_tokens = float(total_tokens)  # an integer might not fit into 32 bits

    def init(params: Any) -> StepsThenTokensState:
        del params
        return StepsThenTokensState(jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def update(
        updates: Any, state: Any, params: Any = None, *, tokens: Any = None, **extra: Any
    ) -> tuple[Any, StepsThenTokensState]:
        del params, extra
        if tokens is None:
            raise ValueError("a decay by tokens needs optimizer.update(..., tokens=tokens_seen)")
        tokens = jnp.asarray(tokens).astype(jnp.float32)
        origin = jnp.where(state.count <= warmup_steps, tokens, state.origin)
        warmup = (
            peak
            * state.count.astype(jnp.float32)
            / jnp.maximum(warmup_steps, 1).astype(jnp.float32)
        )
        later = decayed(kind, tokens, start=origin, total=total_tokens, peak=peak, final=final)
        later = jnp.where(tokens > total_tokens, final, later)
        rate = jnp.where(state.count < warmup_steps, warmup, later).astype(jnp.float32)
        updates = jax.tree.map(lambda u: u * -rate.astype(u.dtype), updates)
        return updates, StepsThenTokensState(state.count + 1, origin, rate)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(peak: Any, warmup_steps: Any, total_tokens: Any, final: Any) -> None:
    if warmup_steps < 0:
        raise ValueError(
            f"warmup_steps must not be negative, got {warmup_steps}. Use 0 for no warmup."
        )
    if total_tokens < 1:
        raise ValueError(f"total_tokens must be at least 1, got {total_tokens}")
    ScheduleConfig(peak=peak, total=1, final=final)  # checks these two


def current_learning_rate(opt_state: Any) -> dict[str, jax.Array]:
    """Return ``{"learning_rate": ...}`` of the last update, from the state of an optimizer with ``steps_then_tokens``.

    Log it with ``with_metrics(step, lambda state: current_learning_rate(state.opt_state))``.

    Raises:
        ValueError: The optimizer contains none or several of them.
    """
    is_ours = lambda x: isinstance(x, StepsThenTokensState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state must contain one schedule of steps_then_tokens, got {len(found)}"
        )
    return {"learning_rate": found[0].learning_rate}
