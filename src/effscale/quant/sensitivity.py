"""Find which parts of a model lose most from quantization."""

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
    """Measure how much the loss grows when a single part of a model is quantized and all others are not.

    The model is compiled once, whatever the number of parts, and evaluated once per part and batch. During this, each
    weight is in memory twice: unquantized and packed.

    Args:
        model: A float model of this library.
        recipe: The formats of the weights and of the inputs of their products.
        loss: A function from a model and a batch to the mean loss of the batch; it is compiled here.
        batches: Batches of the same shape; they have equal weight.
        by: What counts as one part: a ``layer`` (``layers.3``), the weights of one ``kind`` in all layers
            (``attention.query.kernel``), or a single ``weight`` (``layers.3.attention.query.kernel``).

    Returns:
        For each part that the recipe quantizes, the mean loss with this part quantized minus that of the float model.

    Raises:
        ValueError: ``batches`` is empty, or the recipe does not match the model.

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
        raise ValueError("batches must not be empty")
    if by not in typing.get_args(Part):
        raise ValueError(f"by must be layer, kind or weight, got {by!r}")
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
    """Return the number of a weight's layer; weights outside layers come last."""
    found = re.match(r"layers\.(\d+)\.", name)
    return math.inf if found is None else float(found[1])


def _part(name: str, by: Part) -> str:
    """Return the part that a weight belongs to."""
    layer = re.match(r"layers\.\d+(?=\.)", name)
    if by == "weight" or layer is None:
        return name
    return layer[0] if by == "layer" else name[layer.end() + 1 :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes and placeholders, too
class _Either:
    """A weight that can be switched between unquantized and packed."""

    plain: Float[Array, "*shape"]
    packed: PackedWeight
    number: Int[Array, "*stack"]
    is_packed: Bool[Array, "*stack"] | None = None

    def turned(self, is_on: Bool[Array, "weights"]) -> "_Either":
        """Return the weight with its own switch, taken from those of all weights."""
        return dataclasses.replace(self, is_packed=is_on[self.number])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.plain.shape

    @property
    def dtype(self) -> Any:
        """Dtype of results."""
        return self.plain.dtype

    @property
    def T(self) -> "_Either":
        """The transpose of both."""
        return dataclasses.replace(self, plain=self.plain.mT, packed=self.packed.T)

    def astype(self, dtype: Any) -> "_Either":
        """Return both with results in another dtype."""
        return dataclasses.replace(
            self, plain=self.plain.astype(dtype), packed=self.packed.astype(dtype)
        )

    def matmul(
        self, x: Array, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """Multiply by the active one."""
        plain = lambda: finish(x @ self.plain, bias, activation)
        return jax.lax.cond(self.is_packed, lambda: self.packed.matmul(x, bias, activation), plain)

    def take(self, indices: Int[Array, "*rows"]) -> Array:
        """Return rows of the active one."""
        plain = lambda: jnp.take(self.plain, indices, axis=0, mode="clip")
        return jax.lax.cond(self.is_packed, lambda: self.packed.take(indices), plain)

    def dense(self) -> Array:
        """Return the active one."""
        return jax.lax.cond(self.is_packed, self.packed.dense, lambda: self.plain)
