"""Weights that compute as if they were quantized, and are trained: quantization-aware training."""

import dataclasses
import typing
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from effscale.models import finish
from effscale.models.activations import Activation
from effscale.quant.formats import Format
from effscale.quant.quantizers import fake_quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes, shardings and placeholders, too
class FakeQuantizedWeight:
    """A float matrix that is rounded to a format wherever it is used; itself a weight, see `effscale.models.Weight`.

    Its gradient is that of the rounded numbers (the straight-through estimator), so that an optimizer trains ``latent``.

    Attributes:
        latent: The matrix, ``(..., in, out)``, or ``(..., rows, width)`` if ``is_table``.
        format: Of the weight.
        activations: What inputs are rounded to before the product; None leaves them as they are.
        is_table: Whether it is a table of embeddings, in which ``channel`` means a row.
        compute: The type of the result; None takes that of ``latent``, which is rounded in its own type either way.
    """

    latent: Float[Array, "*shape"]
    format: Format = dataclasses.field(metadata={"static": True})
    activations: Format | None = dataclasses.field(default=None, metadata={"static": True})
    is_table: bool = dataclasses.field(default=False, metadata={"static": True})
    compute: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.latent.shape

    @property
    def dtype(self) -> Any:
        """Type of the result."""
        return self.latent.dtype if self.compute is None else self.compute

    @property
    def T(self) -> "FakeQuantizedWeight":
        """The kernel of a table, or the table of a kernel."""
        return dataclasses.replace(self, latent=self.latent.mT, is_table=not self.is_table)

    def astype(self, dtype: Any) -> "FakeQuantizedWeight":
        """The same with results in another type."""
        return dataclasses.replace(self, compute=jax.numpy.dtype(dtype))

    def dense(self) -> Float[Array, "*shape"]:
        """The rounded numbers."""
        kernel = self.latent.mT if self.is_table else self.latent
        rounded = fake_quantize(kernel, self.format).astype(self.dtype)
        return rounded.mT if self.is_table else rounded

    def take(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
        """Rounded rows of the matrix."""
        return jax.numpy.take(self.dense(), indices, axis=0, mode="clip")

    @property
    def input_form(self) -> tuple[str, Format] | None:
        """What an input is rounded to, so that several products of one input share it."""
        if self.is_table or self.activations is None:
            return None
        return "rounded", self.activations

    def prepare(self, x: Float[Array, "rows d_in"]) -> "Rounded":
        """The input, rounded."""
        return Rounded(fake_quantize(x, self.activations))

    def matmul(
        self, x: Any, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """``activation(x W + b)`` of the rounded matrix and input; ``x`` may be what `prepare` made."""
        if not isinstance(x, Rounded):
            x = Rounded(x) if self.input_form is None else self.prepare(x)
        return finish(x.values @ self.dense(), bias, activation)

    def partition(self, axes: tuple[str | None, ...]) -> "FakeQuantizedWeight":
        """Logical axes of the matrix."""
        return dataclasses.replace(self, latent=axes)


class Rounded(typing.NamedTuple):
    """An input after rounding."""

    values: Array
