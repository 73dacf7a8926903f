"""The weight protocol: a weight is anything that ``x @ w`` accepts.

Dense layers and embeddings never ask what their kernel is. A plain array is a weight; so is any registered
pytree with the members of :class:`Weight` (a LoRA pair, a packed integer tensor, a pruned matrix).
Techniques are then functions from a model to a model that swap leaves; see :func:`map_weights`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effscale.models.name_patterns import name_search

Model = TypeVar("Model")


@runtime_checkable
class Weight(Protocol):
    """What a structured weight offers; a plain array has all of it but ``take`` and ``dense``.

    The last two dimensions are ``(in, out)``; any before them are stacked layers or experts.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that this weight stands for."""
        ...

    @property
    def dtype(self) -> Any:
        """Type in which this weight computes."""
        ...

    @property
    def T(self) -> "Weight":
        """The transposed weight (last two dimensions)."""
        ...

    def __rmatmul__(self, x: Array) -> Array:
        """``x @ self`` for ``x`` of shape ``(rows, in)``."""
        ...

    def astype(self, dtype: Any) -> "Weight":
        """The same weight computing in ``dtype``; packed storage keeps its own type."""
        ...

    def take(self, indices: Int[Array, "*rows"]) -> Array:
        """Rows of the dense array, as in an embedding look-up."""
        ...

    def dense(self) -> Array:
        """The dense array that this weight stands for."""
        ...


def dense(weight: Any) -> Float[Array, "*shape"]:
    """The dense array that a weight stands for; a plain array is itself.

    Example:
        >>> import jax.numpy as jnp
        >>> dense(jnp.ones((2, 3))).shape
        (2, 3)
    """
    return jnp.asarray(weight) if _is_array(weight) else weight.dense()


def take(weight: Any, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
    """Rows of a weight of shape ``(rows, width)``, as in an embedding look-up."""
    if _is_array(weight):
        return jnp.take(weight, indices, axis=0, mode="clip")
    return weight.take(indices)


def transpose(weight: Any) -> Any:
    """A weight with its last two dimensions exchanged."""
    return weight.mT if _is_array(weight) else weight.T


def _is_array(weight: Any) -> bool:
    # NumPy's too, as a loader may leave them: their own `take` flattens and their `T` reverses the stack.
    return isinstance(weight, (jax.Array, np.ndarray))


def is_kernel(path: str) -> bool:
    """Whether a parameter's path names the matrix of a dense layer."""
    return path.endswith("kernel")


def map_weights(
    model: Model, function: Callable[[Any], Any], where: str | Callable[[str], bool] = is_kernel
) -> Model:
    r"""A copy of ``model`` in which ``function`` has replaced the chosen weights; the original is untouched.

    Args:
        model: Any NNX module.
        function: From a weight to its replacement. A stacked group hands over its layers at once,
            with their leading dimension.
        where: Which parameters: a regular expression searched in the dotted path
            (``r"attention\..*kernel"``), or a predicate on the path. By default the kernel of every dense layer.

    Returns:
        The new model. Arrays that were not chosen are shared with the old one.

    Raises:
        ValueError: If no parameter matches, or none matches one of the expression's alternatives (``value`` of
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
            f"where={where!r} matches no parameter of {type(model).__name__}; the paths look like {', '.join(names[:4])}, ..."
        )
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
