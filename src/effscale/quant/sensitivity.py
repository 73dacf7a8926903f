"""Which parts of a model suffer most from quantization."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effscale.models import Transformer
from effscale.models.activations import Activation
from effscale.models.weights import dense, finish
from effscale.quant.formats import Format
from effscale.quant.packed import PackedWeight, pack_weight
from effscale.quant.recipes import Recipe, Rule, replace_weights

Part = Literal["layer", "kind", "weight"]


def sensitivity(
    model: Transformer,
    recipe: Recipe,
    loss: Callable[[Transformer, Mapping[str, Any]], Float[Array, ""]],
    batches: Iterable[Mapping[str, Any]],
    *,
    by: Part = "layer",
) -> dict[str, float]:
    """How much the loss grows when a single part of a model is quantized and all others are not.

    The model is compiled once, whatever the number of parts, and evaluated once per part and batch. Meanwhile each weight
    is in memory twice, as it is and packed.

    Args:
        model: A float model of the library.
        recipe: What the weights, and the inputs of their products, are quantized to.
        loss: From a model and a batch to the mean loss of the batch; compiled here.
        batches: Batches of one shape, weighted alike.
        by: What a part is: a ``layer`` (``layers.3``), the weights of one ``kind`` in all layers
            (``attention.query.kernel``), or a single ``weight`` (``layers.3.attention.query.kernel``).

    Returns:
        The mean loss with this part quantized, less that of the float model, for each part that the recipe touches.

    Raises:
        ValueError: There is no batch, or the recipe does not fit the model.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> from effscale.quant import w4a8
        >>> from effscale.training import next_token_loss
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=64, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> ids = jax.random.randint(jax.random.key(0), (4, 9), 0, 64)
        >>> batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        >>> loss = lambda model, batch: next_token_loss(model, batch).mean()
        >>> sorted(sensitivity(model, w4a8(), loss, [batch]))
        ['layers.0', 'layers.1']
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: there is none")
    if by not in typing.get_args(Part):
        raise ValueError(f"by={by!r}: must be layer, kind or weight")
    names: list[str] = []

    def both(weight: Any, rule: Rule, own: list[str]) -> _Either:
        format, activations = cast("Format", rule.weights), rule.activations
        weight = dense(weight)
        is_table = own[0].endswith("embedding")
        packed = pack_weight(weight, format, activations=activations, is_table=is_table)
        numbers = len(names) + np.arange(len(own))
        names.extend(own)
        return _Either(weight, packed, jnp.asarray(numbers.reshape(weight.shape[:-2]), jnp.int32))

    switched = replace_weights(model, recipe, both, to_pack=True)

    @jax.jit
    def measured(switched: Transformer, batch: Mapping[str, Any], is_on: Array) -> Array:
        is_either = lambda node: isinstance(node, _Either)
        turn = lambda w: w.turned(is_on) if is_either(w) else w
        return loss(jax.tree.map(turn, switched, is_leaf=is_either), batch)

    def mean(part: str | None) -> float:
        is_on = jnp.array([part is not None and _part(name, by) == part for name in names])
        return float(np.mean([measured(switched, dict(batch), is_on) for batch in batches]))

    whole = mean(None)
    parts = dict.fromkeys(_part(name, by) for name in sorted(names, key=_layer))
    return {part: mean(part) - whole for part in parts}


def _layer(name: str) -> float:
    """The number of a weight's layer; those outside of layers come last."""
    found = re.match(r"layers\.(\d+)\.", name)
    return math.inf if found is None else float(found[1])


def _part(name: str, by: Part) -> str:
    """The part that a weight belongs to."""
    layer = re.match(r"layers\.\d+(?=\.)", name)
    if by == "weight" or layer is None:
        return name
    return layer[0] if by == "layer" else name[layer.end() + 1 :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes and placeholders, too
class _Either:
    """A weight that is one of two: as it was, or packed."""

    plain: Float[Array, "*shape"]
    packed: PackedWeight
    number: Int[Array, "*stack"]
    is_packed: Bool[Array, "*stack"] | None = None

    def turned(self, is_on: Bool[Array, "weights"]) -> "_Either":
        """With its own of all weights' switches."""
        return dataclasses.replace(self, is_packed=is_on[self.number])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of either."""
        return self.plain.shape

    @property
    def dtype(self) -> Any:
        """Type of results."""
        return self.plain.dtype

    @property
    def T(self) -> "_Either":
        """Both transposed."""
        return dataclasses.replace(self, plain=self.plain.mT, packed=self.packed.T)

    def astype(self, dtype: Any) -> "_Either":
        """Both in another type."""
        return dataclasses.replace(
            self, plain=self.plain.astype(dtype), packed=self.packed.astype(dtype)
        )

    def matmul(
        self, x: Array, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """The product with the one that is on."""
        plain = lambda: finish(x @ self.plain, bias, activation)
        return jax.lax.cond(self.is_packed, lambda: self.packed.matmul(x, bias, activation), plain)

    def take(self, indices: Int[Array, "*rows"]) -> Array:
        """Rows of the one that is on."""
        plain = lambda: jnp.take(self.plain, indices, axis=0, mode="clip")
        return jax.lax.cond(self.is_packed, lambda: self.packed.take(indices), plain)

    def dense(self) -> Array:
        """The one that is on."""
        return jax.lax.cond(self.is_packed, self.packed.dense, lambda: self.plain)
