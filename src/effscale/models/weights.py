"""The weight protocol: a weight is anything that ``matmul`` accepts.

Dense layers, heads, embeddings and the decoding loop do not depend on the kind of their weights. A plain array is a
weight, and so is any registered pytree with the members of ``Weight`` (a LoRA pair, a packed integer tensor, a pruned
matrix). Techniques are then functions from a model to a model that replace leaves; see ``map_weights``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from effscale.models.activations import ACTIVATIONS, Activation
from effscale.models.name_patterns import name_search

Model = TypeVar("Model")


@runtime_checkable
class Weight(Protocol):
    """The members of a structured weight.

    The last two dimensions are ``(in, out)``. Any dimensions before them are stacked layers or experts, which
    ``jax.lax.scan`` and ``jax.vmap`` remove before the weight is used.

    Three members are optional:

    - ``partition(axes)``: the logical axes of each of its arrays, derived from those of the dense weight, for sharding.
    - ``input_form`` and ``prepare(x)``: for a weight that first converts its input to another form, such as 8-bit integers
      and their scales. ``input_form`` identifies that form by any hashable value. Projections of one input whose weights have
      the same form share it: ``matmuls`` calls ``prepare`` once for all of them and passes the result to each ``matmul`` in
      place of ``x``.
    - ``fixed_weight``: True for a weight that is never trained, so that an optimizer does not decay the scales of a packed
      weight.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array that this weight represents."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype in which this weight computes."""
        ...

    @property
    def T(self) -> "Weight":
        """The transposed weight (last two dimensions)."""
        ...

    def matmul(
        self, x: Any, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """Compute ``activation(x W + b)`` for ``x`` of shape ``(rows, in)``, in the dtype of this weight.

        A weight whose kernel fuses the bias or the activation applies them here; others call ``finish``.
        """
        ...

    def astype(self, dtype: Any) -> "Weight":
        """Return the same weight computing in ``dtype``; packed storage keeps its own dtype."""
        ...

    def take(self, indices: Int[Array, "*rows"]) -> Array:
        """Return rows of the dense array, as in an embedding lookup."""
        ...

    def dense(self) -> Array:
        """Return the dense array that this weight represents."""
        ...


def dense(weight: Any) -> Float[Array, "*shape"]:
    """Return the dense array that a weight represents; a plain array is returned as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> dense(jnp.ones((2, 3))).shape
        (2, 3)
    """
    return jnp.asarray(weight) if _is_array(weight) else weight.dense()


class Affine(NamedTuple):
    """A map ``activation(x W + b)``; ``matmuls`` computes one or more of them.

    Attributes:
        weight: Any weight of shape ``(in, out)``.
        bias: Array of shape ``(out,)``, or None for no bias.
        activation: A name in ``effscale.models.ACTIVATIONS``, or None for no activation.
        point: Name of the value before the activation, which the backward pass can keep instead of recomputing it (see
            ``effscale.models.points``). For a structured weight, it is the value after the activation.
    """

    weight: Any
    bias: Array | None = None
    activation: Activation | None = None
    point: str | None = None


def matmul(
    x: Float[Array, "*batch d_in"],
    weight: Any,
    bias: Float[Array, "d_out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Multiply an input by any weight, then apply bias and activation.

    $$y = \mathrm{activation}(x W + b)$$

    Every product with a weight is computed here: in dense layers, heads and the decoding loop. For weights that are stacked
    over experts, use ``jax.vmap(matmul)``.

    Args:
        x: The input; its dtype is that of the computation and of the result.
        weight: An array or an ``effscale.models.Weight`` of shape ``(d_in, d_out)``.
        bias: Added to the product; None adds nothing.
        activation: A name in ``effscale.models.ACTIVATIONS``; None applies none.

    Example:
        >>> import jax.numpy as jnp
        >>> matmul(jnp.ones((2, 3, 4)), jnp.ones((4, 8)), activation="relu").shape
        (2, 3, 8)
    """
    return matmuls(x, Affine(weight, bias, activation))[0]


def matmuls(
    x: Float[Array, "*batch d_in"], *affines: Affine
) -> tuple[Float[Array, "*batch _"], ...]:
    """Apply several maps to one input, such as query, key and value.

    The result is that of ``matmul`` for each, except that weights that convert the input to the same form share the
    converted input; see ``effscale.models.Weight``.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = matmuls(jnp.ones((2, 4)), Affine(jnp.ones((4, 8))), Affine(jnp.ones((4, 2))))
        >>> query.shape, key.shape
        ((2, 8), (2, 2))
    """
    lead, dtype = x.shape[:-1], x.dtype
    cast: Callable[[Any], Any] = lambda a: None if a is None else a.astype(dtype)
    # One large matrix product: on XLA's CPU backend, the same product over three dimensions runs at a third of the speed.
    rows = lambda: x.reshape(-1, x.shape[-1])
    shared = _prepared(rows, [affine.weight for affine in affines], dtype)
    results = []
    for weight, bias, activation, point in affines:
        weight, bias = cast(weight), cast(bias)
        if _is_array(weight):
            y = finish(rows() @ weight, bias, None).reshape(*lead, -1)
            results.append(finish(_named(y, point), None, activation))
        else:
            x_form = rows() if shared is None else shared
            y = weight.matmul(x_form, bias, activation).reshape(*lead, -1)
            results.append(_named(y, point))
    return tuple(results)


def _named(y: Array, point: str | None) -> Array:
    return y if point is None else checkpoint_name(y, point)


def _prepared(rows: Callable[[], Array], weights: list[Any], dtype: Any) -> Any:
    """Return the input in the form that all these weights share, or None if their forms differ."""
    forms = {getattr(weight, "input_form", None) for weight in weights}
    if len(forms) > 1 or None in forms:
        return None
    return weights[0].astype(dtype).prepare(rows())


def finish(
    y: Float[Array, "*batch d_out"],
    bias: Float[Array, "d_out"] | None,
    activation: Activation | None,
) -> Float[Array, "*batch d_out"]:
    """Compute ``activation(y + b)``, the steps after a product, for weights whose kernel does not include them.

    Example:
        >>> import jax.numpy as jnp
        >>> finish(jnp.array([[-2.0, 1.0]]), jnp.array([1.0, 1.0]), "relu").tolist()
        [[0.0, 2.0]]
    """
    if bias is not None:
        y = y + bias[(None,) * (y.ndim - 1)]
    return y if activation is None else ACTIVATIONS[activation](y)


def take(weight: Any, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
    """Return rows of a weight of shape ``(rows, width)``, as in an embedding lookup."""
    if _is_array(weight):
        return jnp.take(weight, indices, axis=0, mode="clip")
    return weight.take(indices)


def transpose(weight: Any) -> Any:
    """Return a weight with its last two dimensions swapped."""
    return weight.mT if _is_array(weight) else weight.T


def _is_array(weight: Any) -> bool:
    # Includes NumPy arrays, which a loader may leave: their own ``take`` flattens and their ``T`` reverses the stack.
    return isinstance(weight, (jax.Array, np.ndarray))


def is_kernel(path: str) -> bool:
    """Return whether a parameter's path names the matrix of a dense layer."""
    return path.endswith("kernel")


def map_weights(
    model: Model, function: Callable[[Any], Any], where: str | Callable[[str], bool] = is_kernel
) -> Model:
    r"""Return a copy of ``model`` with ``function`` applied to the chosen weights; the original is not changed.

    Args:
        model: Any NNX module.
        function: Maps a weight to its replacement. The layers of a stacked group are passed together, with their
            leading dimension.
        where: Which parameters: a regular expression searched in the dotted path
            (``r"attention\..*kernel"``), or a predicate on the path. By default, the kernel of every dense layer.

    Returns:
        The new model. It shares the arrays that were not chosen with the old one.

    Raises:
        ValueError: No parameter matches, or none matches one of the expression's alternatives (``value`` in
            ``"query|value"``).

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Dense
        >>> layer = Dense(4, 8, rngs=nnx.Rngs(0))
        >>> halved = map_weights(layer, lambda w: w / 2)
    """
    graphdef, state = nnx.split(model)
    flat = [
        (".".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)
    ]
    names = [name for name, _, _ in flat]
    chosen = name_search(where, names, option="where") if isinstance(where, str) else where
    leaves, hits = [], 0
    for name, path, variable in flat:
        if chosen(name):
            hits += 1
            variable = variable.replace(function(variable.get_value()))
        leaves.append((path, variable))
    if not hits:
        raise ValueError(
            f"where={where!r} matches no parameter of {type(model).__name__}. Paths look like {', '.join(names[:4])}, ..."
        )
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
