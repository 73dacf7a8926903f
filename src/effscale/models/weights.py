"""The weight protocol: a weight is anything that :func:`matmul` accepts.

Dense layers, heads, embeddings and the decoding loop never ask what their weight is. A plain array is a weight; so is any
registered pytree with the members of :class:`Weight` (a LoRA pair, a packed integer tensor, a pruned matrix).
Techniques are then functions from a model to a model that swap leaves; see :func:`map_weights`.
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
    """What a structured weight offers.

    The last two dimensions are ``(in, out)``; any before them are stacked layers or experts, which :func:`jax.lax.scan`
    and :func:`jax.vmap` take off before the weight is used.

    Three members are optional:

    - ``partition(axes)``: the logical axes of each of its arrays, from those of the dense weight, so that it shards.
    - ``input_form`` and ``prepare(x)``: a weight that turns its input into another form first (8-bit codes and their
      steps) names that form with any hashable value. Projections of one input whose weights name the same form then share it:
      :func:`matmuls` calls ``prepare`` once for all of them and hands the result to each ``matmul`` in place of ``x``.
    - ``fixed_weight``: True for a weight that is never trained; an optimizer would decay the scales of a packed one.
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

    def matmul(
        self, x: Any, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """``activation(x W + b)`` for ``x`` of shape ``(rows, in)``, in the type of this weight.

        A weight whose kernel fuses the bias or the activation does so here; :func:`finish` is for the others.
        """
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


class Affine(NamedTuple):
    """A map ``activation(x W + b)``: what :func:`matmuls` computes one or several of.

    Attributes:
        weight: Any weight of shape ``(in, out)``.
        bias: ``(out,)``; None adds nothing.
        activation: A name of :data:`effscale.models.ACTIVATIONS`; None applies none.
        point: Name of the value before the activation, which the backward pass can keep instead of computing it again (see
            :mod:`effscale.models.points`). Of a weight that is no array it is the value after it.
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
    r"""The product of an input with any weight, with what usually follows it.

    $$y = \mathrm{activation}(x W + b)$$

    Every product with a weight goes through here: dense layers, heads, the decoding loop. For weights that are stacked over
    experts, use ``jax.vmap(matmul)``.

    Args:
        x: The input; its type is that of the computation and of the result.
        weight: An array or a :class:`Weight` of shape ``(d_in, d_out)``.
        bias: Added to the product; None adds nothing.
        activation: A name of :data:`effscale.models.ACTIVATIONS`; None applies none.

    Example:
        >>> import jax.numpy as jnp
        >>> matmul(jnp.ones((2, 3, 4)), jnp.ones((4, 8)), activation="relu").shape
        (2, 3, 8)
    """
    return matmuls(x, Affine(weight, bias, activation))[0]


def matmuls(
    x: Float[Array, "*batch d_in"], *affines: Affine
) -> tuple[Float[Array, "*batch _"], ...]:
    """Several maps of one input, as query, key and value are: :func:`matmul` of each, except that weights that first turn
    the input into another form share it; see :class:`Weight`.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = matmuls(jnp.ones((2, 4)), Affine(jnp.ones((4, 8))), Affine(jnp.ones((4, 2))))
        >>> query.shape, key.shape
        ((2, 8), (2, 2))
    """
    lead, dtype = x.shape[:-1], x.dtype
    cast: Callable[[Any], Any] = lambda a: None if a is None else a.astype(dtype)
    # One large matrix product: XLA's CPU backend runs the same over three dimensions at a third of the speed.
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
    """The input in the form that all these weights name, or None if they do not name the same one."""
    forms = {getattr(weight, "input_form", None) for weight in weights}
    if len(forms) > 1 or None in forms:
        return None
    return weights[0].astype(dtype).prepare(rows())


def finish(
    y: Float[Array, "*batch d_out"],
    bias: Float[Array, "d_out"] | None,
    activation: Activation | None,
) -> Float[Array, "*batch d_out"]:
    """``activation(y + b)``: what follows a product, for weights whose own kernel does not include it.

    Example:
        >>> import jax.numpy as jnp
        >>> finish(jnp.array([[-2.0, 1.0]]), jnp.array([1.0, 1.0]), "relu").tolist()
        [[0.0, 2.0]]
    """
    if bias is not None:
        y = y + bias[(None,) * (y.ndim - 1)]
    return y if activation is None else ACTIVATIONS[activation](y)


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
