"""Fake-quantized weights for quantization-aware training: they compute as if quantized, and are trained in floats."""

import dataclasses
import typing
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from effscale.models import dense, finish, transpose
from effscale.models.activations import Activation
from effscale.quant.bit_schedules import MOST_BITS, BitSchedule, fake_quantize_at
from effscale.quant.formats import Format
from effscale.quant.pruning.weight import PrunedWeight, first_step
from effscale.quant.quantizers import fake_quantize


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
