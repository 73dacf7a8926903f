"""Compute the size of a model in bytes, before and after quantization, without creating any arrays.

There are two ways to count, with different answers for the same model. Papers tend to count only the codes: BERT-base
in one bit is then 32 times smaller. A file or a device also holds scales and everything that stays in float
(positions, norms, biases, pooler, head): with these it is 24 times smaller.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from effscale.models import Transformer, TransformerConfig
from effscale.quant.packed import PackedWeight
from effscale.quant.recipes import Recipe, quantize_model

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Bytes of a model by kind of content.

    Example:
        >>> float_model = ModelSize(codes=0, scales=0, unquantized=64 * 2**20)
        >>> binary = ModelSize(codes=2 * 2**20, scales=2**10, unquantized=2 * 2**20)
        >>> binary.total / 2**20
        4.0009765625
        >>> binary.describe(float_model)
        '4.00 MiB (16.0x smaller); the codes alone: 2.00 MiB (32.0x)'
    """

    codes: int
    """Bytes of the packed codes of quantized weights."""
    scales: int
    """Bytes of their scales and zero points."""
    unquantized: int
    """Bytes of all other arrays."""

    @property
    def total(self) -> int:
        """Total bytes."""
        return self.codes + self.scales + self.unquantized

    def describe(self, original: "ModelSize") -> str:
        """Describe the total and the codes, each compared with the total bytes of another model.

        Args:
            original: The size of the model that this one was made from.
        """
        times = lambda size: f"{original.total / size:.1f}x"
        total = f"{self.total / MEBIBYTE:.2f} MiB ({times(self.total)} smaller)"
        if not self.codes:
            return total
        return f"{total}; the codes alone: {self.codes / MEBIBYTE:.2f} MiB ({times(self.codes)})"


def model_size(model: nnx.Module | TransformerConfig, recipe: Recipe | None = None) -> ModelSize:
    """Return the bytes of a model, as it is or as ``quantize_model`` would make it.

    Only shapes are evaluated; no arrays are created.

    Args:
        model: A model, quantized or not, or the config of one.
        recipe: The formats of each weight; None counts the model as it is.

    Raises:
        ValueError: As for ``quantize_model``.

    Example:
        >>> from effscale.models import bert
        >>> from effscale.quant import w1a8
        >>> base = lambda layers: bert(num_layers=layers, d_model=768, num_heads=12)  # BERT-base has 12
        >>> model_size(base(6), w1a8()).describe(model_size(base(12)))
        '11.97 MiB (34.9x smaller); the codes alone: 7.86 MiB (53.2x)'
    """
    if isinstance(model, TransformerConfig):
        model = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    if recipe is not None:
        model = jax.eval_shape(lambda float_model: quantize_model(float_model, recipe), model)
    codes = scales = unquantized = 0
    for leaf in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, PackedWeight)):
        if isinstance(leaf, PackedWeight):
            everything = sum(map(_bytes, jax.tree.leaves(leaf)))
            codes += _bytes(leaf.data)
            scales += everything - _bytes(leaf.data)
        else:
            unquantized += _bytes(leaf)
    return ModelSize(codes=codes, scales=scales, unquantized=unquantized)


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
