r"""Bit schedules for quantization-aware training: start with many bits and drop one at a time, each stage twice as
long as the one before.

With t the optimizer steps since the schedule's offset and p its period, the number of bits is

$$b(t) = \max(b_{\mathrm{target}},\; b_{\mathrm{start}} - |\{k \ge 0 : t \ge 2^k p\}|)$$

References:
    DeepSpeed, "Mixture of Quantization (MoQ)", tutorial and ``runtime/quantize.py``.
        https://www.deepspeed.ai/tutorials/MoQ-tutorial/
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effscale.options import Bounds, Options, check
from effscale.quant.formats import Format
from effscale.quant.quantizers import (
    AXES,
    binary,
    code_range,
    group_scale,
    grouped_shape,
    ternary,
)

MOST_BITS = 16
"""The most bits that a schedule may start from; with more, float32 has too little precision left to round."""

NEVER = 2**31 - 1
"""A step count that is never reached; steps are counted in 32 bits."""


StepCount = Annotated[int, Bounds(at_least=0, at_most=NEVER)]
"""A number of optimizer steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitSchedule(Options):
    """The number of bits that weights are rounded to at each step.

    The k-th bit is dropped after ``period * 2**(k - 1)`` optimizer steps, as in DeepSpeed's MoQ.

    Example:
        >>> schedule = BitSchedule(start_bits=12, target_bits=8, period=50)
        >>> [schedule.bits(step) for step in (0, 49, 50, 100, 199, 200, 400, 10_000)]
        [12, 12, 11, 10, 10, 9, 8, 8]
        >>> schedule.end
        400
    """

    start_bits: Annotated[int, Bounds(at_least=1, at_most=MOST_BITS)]
    """Number of bits at the start; at most 16."""
    target_bits: Annotated[int, Bounds(at_least=1, at_most=MOST_BITS)]
    """Number of bits at the end; must equal ``bits`` of the weights' ``Format``."""
    period: Annotated[int, Bounds(at_least=1, at_most=NEVER)] = 1
    """Optimizer steps until the first bit is dropped. Each further drop comes at twice the number of steps."""
    offset: StepCount = 0
    """Optimizer steps before rounding begins."""
    change_ratio: Annotated[float, Bounds(above=0, at_most=1)] | None = None
    r"""After each change of bits, the rounded weight is blended in by this fraction per step: $\rho$ decreases from 1 by this amount, and the
    weight is $\rho W + (1 - \rho) Q(W)$ (DeepSpeed's ``fp16_mixed_quantize``, which uses 0.001). None switches immediately."""

    def __post_init__(self):
        super().__post_init__()
        wanted = f"from target_bits={self.target_bits} to {MOST_BITS}"
        check(self, self.target_bits <= self.start_bits, "start_bits", wanted)

    @property
    def drops(self) -> tuple[int, ...]:
        """The steps at which a bit is dropped."""
        count = self.start_bits - self.target_bits
        return tuple(min(self.offset + self.period * 2**k, NEVER) for k in range(count))

    @property
    def end(self) -> int:
        """The step from which weights are fully rounded to ``target_bits``."""
        last = self.drops[-1] if self.drops else self.offset
        return last if self.change_ratio is None else last + int(np.ceil(1 / self.change_ratio))

    def bits(self, step: Any) -> Any:
        """Return the number of bits at a step.

        Args:
            step: Optimizer steps completed; a number, or an array, which may be traced.

        Returns:
            The number of bits. Before the offset it is 32, which means no rounding.
        """
        if isinstance(step, int):
            taken = sum(step >= drop for drop in self.drops)
            return self.start_bits - taken if step >= self.offset else 32
        bits = jnp.full_like(step, self.start_bits)
        for drop in self.drops:
            bits = bits - (step >= drop).astype(bits.dtype)
        return jnp.where(step >= self.offset, bits, 32)

    def mixed(self, step: Any) -> Any:
        r"""Return the unrounded fraction $\rho$ of the weight at a step."""
        if self.change_ratio is None:
            return jnp.float32(0)
        begun = jnp.max(jnp.stack([jnp.where(step >= s, s, 0) for s in (self.offset, *self.drops)]))
        since = (step - begun).astype(jnp.float32)
        return jnp.maximum(0.0, 1.0 - jnp.float32(self.change_ratio) * since)


def fake_quantize_at(
    x: Float[Array, "*shape"], format: Format, schedule: BitSchedule, step: Any
) -> Float[Array, "*shape"]:
    """Fake-quantize a kernel with the number of bits that a schedule has at a step.

    See ``effscale.quant.fake_quantize`` for rounding and gradients.

    The number of bits is data and not part of the compiled program, so it can change without recompilation.

    Args:
        x: A kernel ``(..., in, out)``.
        format: The final format.
        schedule: The bits on the way there; its ``target_bits`` must equal ``format.bits``.
        step: Optimizer steps completed: a number, or an int32 array that is a scalar or has the kernel's stacked
            dimensions. It may be traced.

    Returns:
        The rounded values in the dtype of ``x``. Gradients pass straight through to ``x``.

    Raises:
        ValueError: The schedule does not end in the bits of the format.

    Example:
        >>> format = Format(bits=1, granularity="tensor", spread="paper")
        >>> schedule = BitSchedule(start_bits=3, target_bits=1, period=10)
        >>> x = jnp.array([[-1.0, 0.25], [0.5, 0.75]])
        >>> [fake_quantize_at(x, format, schedule, step).tolist() for step in (0, 10, 20)]
        [[[-1.0, 0.25], [0.5, 0.75]], [[-0.75, 0.0], [0.75, 0.75]], [[-0.625, 0.625], [0.625, 0.625]]]

    References:
        DeepSpeed, "Mixture of Quantization (MoQ)", tutorial. https://www.deepspeed.ai/tutorials/MoQ-tutorial/
    """
    check_schedule(schedule, format)
    stack = x.shape[:-2]
    step = jnp.broadcast_to(jnp.asarray(step, jnp.int32), stack)
    one = lambda x, step: _at(x, step, format, schedule)
    for _ in stack:
        one = jax.vmap(one)
    return one(x, step)


def check_schedule(schedule: BitSchedule, format: Format) -> None:
    """Raise a ``ValueError`` unless a schedule ends in the bits of a format and the format uses integers."""
    if format.floating:
        raise ValueError("schedule must be None for float8 weights: they have no bits to drop")
    if schedule.target_bits != format.bits:
        raise ValueError(
            f"schedule must end in the bits of the weights' format, got target_bits={schedule.target_bits} and bits={format.bits}"
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _at(x: Array, step: Array, format: Format, schedule: BitSchedule) -> Array:
    """Round one kernel at a scalar step."""
    bits = schedule.bits(step)
    wide = jnp.clip(bits, 3, MOST_BITS)
    half = jnp.left_shift(jnp.int32(1), wide - 1).astype(jnp.float32)
    axes, exact = AXES[format.granularity], x.astype(jnp.float32)
    grouped = exact.reshape(grouped_shape(x.shape, format))
    scale, zero = group_scale(x, format, half)
    scale = jnp.expand_dims(scale, axes)
    zero = jnp.float32(0) if zero is None else jnp.expand_dims(zero, axes)
    values = jnp.clip(jnp.round((grouped - zero) / scale), *code_range(format, half)) * scale + zero
    for few, quantizer in ((2, ternary), (1, binary)):
        if schedule.target_bits <= few:
            codes, size = quantizer(grouped, axes)
            values = jnp.where(bits == few, codes.astype(jnp.float32) * size, values)
    rho = schedule.mixed(step)
    values = rho * exact + (1.0 - rho) * values.reshape(x.shape)
    return jnp.where(bits > MOST_BITS, x, values.astype(x.dtype))


@_at.defjvp
def _at_jvp(format: Format, schedule: BitSchedule, primals: Any, tangents: Any) -> Any:
    """The straight-through estimator."""
    return _at(*primals, format, schedule), tangents[0]
