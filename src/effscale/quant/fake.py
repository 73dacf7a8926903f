"""Fake-quantized weights for quantization-aware training: they compute as if quantized, and are trained in floats.

Their bits may depend on the number of optimizer steps; ``scheduled_step`` advances them.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Float, Int

from effscale.models import finish
from effscale.models.activations import Activation
from effscale.models.weights import dense, transpose
from effscale.quant.bit_schedules import MOST_BITS, BitSchedule, fake_quantize_at
from effscale.quant.formats import Format
from effscale.quant.pruning.weight import PrunedWeight, first_step
from effscale.quant.quantizers import fake_quantize

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes, shardings and placeholders, too
class FakeQuantizedWeight:
    """A float matrix that is rounded to a format each time it is used; implements ``effscale.models.Weight``.

    The gradient of the rounded values is passed to ``latent`` (the straight-through estimator), which an optimizer
    trains.

    Attributes:
        latent: The matrix, ``(..., in, out)``, or ``(..., rows, width)`` if ``is_table``; an array, or a pruned weight.
        format: Format of the weight.
        activations: Format that inputs are rounded to before the product; None leaves them unrounded.
        is_table: Whether it is an embedding table, where ``channel`` means a row.
        compute: The dtype of the result; None uses that of ``latent``. ``latent`` is rounded in its own dtype either
            way.
        schedule: Bits on the way to those of ``format``; None uses the final bits from the start.
        activations_offset: Optimizer steps before inputs are rounded.
        step: Optimizer steps completed, int32, ``(...)``; set by ``at_step``. None if nothing depends on it.
    """

    latent: Any
    format: Format = dataclasses.field(metadata={"static": True})
    activations: Format | None = dataclasses.field(default=None, metadata={"static": True})
    is_table: bool = dataclasses.field(default=False, metadata={"static": True})
    compute: Any = dataclasses.field(default=None, metadata={"static": True})
    schedule: BitSchedule | None = dataclasses.field(default=None, metadata={"static": True})
    activations_offset: int = dataclasses.field(default=0, metadata={"static": True})
    step: Int[Array, "*stack"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.latent.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the result."""
        return self.latent.dtype if self.compute is None else self.compute

    @property
    def T(self) -> "FakeQuantizedWeight":
        """The transpose: the kernel of a table, or the table of a kernel."""
        return dataclasses.replace(self, latent=transpose(self.latent), is_table=not self.is_table)

    def astype(self, dtype: Any) -> "FakeQuantizedWeight":
        """Return the same weight with results in another dtype."""
        return dataclasses.replace(self, compute=jax.numpy.dtype(dtype))

    def dense(self) -> Float[Array, "*shape"]:
        """Return the rounded values."""
        latent = dense(self.latent)
        kernel = latent.mT if self.is_table else latent
        if self.schedule is None:
            rounded = fake_quantize(kernel, self.format)
        else:
            rounded = fake_quantize_at(kernel, self.format, self.schedule, self.step)
        rounded = rounded.astype(self.dtype)
        return rounded.mT if self.is_table else rounded

    def take(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
        """Return rounded rows of the matrix.

        If each row of a table has separate scales, only the requested rows are rounded.
        """
        if not self.is_table or self.format.granularity not in ("channel", "group"):
            return jax.numpy.take(self.dense(), indices, axis=0, mode="clip")
        rows = jax.numpy.take(self.latent, indices.reshape(-1), axis=0, mode="clip")
        return dataclasses.replace(self, latent=rows).dense().reshape(*indices.shape, -1)

    @property
    def input_form(self) -> tuple[str, Format, int] | None:
        """The form that an input is rounded to, so that several products of the same input can share it."""
        if self.is_table or self.activations is None:
            return None
        return "rounded", self.activations, self.activations_offset

    def prepare(self, x: Float[Array, "rows d_in"]) -> "Rounded":
        """Return the rounded input."""
        rounded = fake_quantize(x, self.activations)
        if self.step is not None and self.activations_offset > 0:
            rounded = jax.numpy.where(self.step >= self.activations_offset, rounded, x)
        return Rounded(rounded)

    def matmul(
        self, x: Any, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """Return ``activation(x W + b)`` for the rounded matrix and input; ``x`` may be the result of ``prepare``."""
        if not isinstance(x, Rounded):
            x = Rounded(x) if self.input_form is None else self.prepare(x)
        if bias is not None and isinstance(self.latent, PrunedWeight):
            bias = self.latent.masked_bias(bias)
        return finish(x.values @ self.dense(), bias, activation)

    def partition(self, axes: tuple[str | None, ...]) -> "FakeQuantizedWeight":
        """Return the logical axes of the matrix."""
        inner = hasattr(self.latent, "partition")
        return dataclasses.replace(
            self,
            latent=self.latent.partition(axes) if inner else axes,
            step=None if self.step is None else axes[:-2],
        )

    def at_step(self, step: Any) -> "FakeQuantizedWeight":
        """Return the same weight after ``step`` optimizer steps."""
        latent = self.latent
        if isinstance(latent, PrunedWeight):
            latent = latent.at_step(step)
        if self.step is None:
            return dataclasses.replace(self, latent=latent)
        step = jax.numpy.broadcast_to(jax.numpy.asarray(step, "int32"), self.step.shape)
        return dataclasses.replace(self, latent=latent, step=step)

    def check_finished(self) -> None:
        """Raise a ``ValueError`` if the schedule of its bits or of its mask has not ended. A traced step is not
        checked.
        """
        if isinstance(self.latent, PrunedWeight):
            self.latent.check_finished()
        if self.schedule is None or self.step is None:
            return
        step, end = first_step(self.step), self.schedule.end
        if step < end:
            bits, target = self.schedule.bits(step), self.schedule.target_bits
            now = "not rounded" if bits > MOST_BITS else f"in {bits} bits"
            raise ValueError(
                f"at step {step} its weights are still {now}; they reach {target} bits at step {end}. Train until then, or use "
                f"at_step(model, {end}) and check the loss"
            )


class Rounded(typing.NamedTuple):
    """An input after rounding."""

    values: Array


SCHEDULED = (FakeQuantizedWeight, PrunedWeight)


def at_step(model: Tree, step: Any) -> Tree:
    """Return a model with its bit and mask schedules advanced to a step.

    Magnitude masks are computed when their offset is reached or passed, from the weights at that time.

    Args:
        model: Any pytree that contains fake-quantized or pruned weights; everything else is unchanged.
        step: Optimizer steps completed: an integer or an int32 scalar, which may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.quant import BitSchedule, Format
        >>> from effscale.quant.fake import FakeQuantizedWeight
        >>> schedule = BitSchedule(start_bits=8, target_bits=2, period=10)
        >>> w = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
        >>> weight = FakeQuantizedWeight(
        ...     w, Format(bits=2, granularity="tensor"), schedule=schedule, step=jnp.int32(0))
        >>> values = lambda step: jnp.unique(at_step({"w": weight}, step)["w"].dense()).size
        >>> values(0), values(schedule.end)
        (32, 3)
    """
    is_scheduled = lambda node: isinstance(node, SCHEDULED)
    move = lambda node: node.at_step(step) if is_scheduled(node) else node
    return jax.tree.map(move, model, is_leaf=is_scheduled)


def scheduled_step(train_step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    r"""Wrap a training step so that it advances the model's bit and mask schedules.

    Schedules count optimizer updates: a skipped step does not advance them.

    Args:
        train_step: A step from ``effscale.training.make_train_step``, or any ``(state, ...) -> (state, metrics)``
            whose states are dataclasses with ``model``, ``step`` and, if updates may be skipped, ``skipped``.

    Returns:
        A step with the same signature, for ``jax.jit``, ``fit`` or ``StagedStep``. It is compiled once for all bits.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from effscale.models import Dense
        >>> from effscale.quant import BitSchedule, Format, Recipe, Rule, fake_quantize_model
        >>> from effscale.training import Loss, create_train_state, make_train_step
        >>> schedule = BitSchedule(start_bits=8, target_bits=4, period=10, offset=5)
        >>> recipe = Recipe((Rule(where="kernel", weights=Format(bits=4), schedule=schedule),))
        >>> model = fake_quantize_model(Dense(8, 4, rngs=nnx.Rngs(0)), recipe)
        >>> def loss(model, x, key):
        ...     return Loss(jnp.square(model(x)).sum(), jnp.float32(x.size))
        >>> state = create_train_state(model, optax.sgd(0.1), key=jax.random.key(0))
        >>> step = jax.jit(scheduled_step(make_train_step(loss, optax.sgd(0.1))))
        >>> state, metrics = step(state, jnp.ones((2, 8)))
        >>> int(state.model.kernel.get_value().step)
        1
    """

    def step(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        new, metrics = train_step(state, *args, **kwargs)
        updates = new.step - getattr(new, "skipped", 0)
        return dataclasses.replace(new, model=at_step(new.model, updates)), metrics

    return step
