"""The state of a training run as one pytree, with its exact count of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from effscale.training.partition import Trainable, combine, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counter:
    """A non-negative integer below 2^64 in two uint32 limbs, usable under ``jax.jit``.

    JAX has no 64-bit integers unless ``jax_enable_x64`` is set, an int32 overflows at 2.1 billion tokens, and a
    float32 cannot count single tokens beyond 16.8 million.

    >>> counter = Counter.of(2**32 - 1).add(2)
    >>> int(counter), float(counter.to_float32())
    (4294967297, 4294967296.0)
    """

    high: Any
    low: Any

    @classmethod
    def of(cls, value: int) -> "Counter":
        """Create a counter with the given value.

        Raises:
            ValueError: ``value`` is negative or does not fit into 64 bits.
        """
        if not 0 <= value < 2**64:
            raise ValueError(f"value must be in [0, 2**64), got {value}")
        return cls(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))

    def add(self, amount: Any) -> "Counter":
        """Return a counter increased by ``amount``, a non-negative integer below 2^32 (traced or not)."""
        low = self.low + jnp.asarray(amount).astype(jnp.uint32)
        return Counter(self.high + (low < self.low).astype(jnp.uint32), low)

    def to_float32(self) -> jax.Array:
        """Return the nearest float32, with a relative error up to 6e-8, for schedules."""
        return self.high.astype(jnp.float32) * jnp.float32(2.0**32) + self.low.astype(jnp.float32)

    def __int__(self) -> int:
        """Return the exact value as a Python integer; this waits for the device."""
        high, low = jax.device_get((self.high, self.low))
        return (int(high) << 32) | int(low)


@runtime_checkable
class CountsSteps(Protocol):
    """The interface of states that ``fit`` accepts: any pytree with ``step``, the number of batches consumed.

    Two more attributes are used if they exist: ``tokens``, for the speed, and ``skipped_in_row``, by which checkpoints know
    that updates were being skipped. Both may be properties.
    """

    @property
    def step(self) -> Any:
        """An integer, or an integer scalar array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a training step reads and writes, for one model.

    A custom state (several models, phases) is any pytree with ``step``; it may contain a ``TrainState``.

    Attributes:
        model: The whole module, including frozen leaves.
        opt_state: The state of the optimizer over the trained leaves.
        step: The number of batches consumed, an int32 scalar. It also advances when an update is skipped, so that it
            matches the data.
        tokens: The exact number of tokens seen (see ``Counter``).
        key: The PRNG key of the run. It never changes; the key of a step is ``fold_in(key, step)``.
        ema: The exponential moving average of the trained leaves, or None.
        skipped: The total number of skipped updates, an int32 scalar.
        skipped_in_row: The number of updates skipped since the last applied one, an int32 scalar.
    """

    model: Any
    opt_state: Any
    step: Any
    tokens: Any
    key: Any
    ema: Any
    skipped: Any
    skipped_in_row: Any

    def to_items(self) -> dict[str, Any]:
        """Return the named items of a checkpoint: the model and its average are separate, so that each can be read without the other."""
        items = {"model": self.model, "train": dataclasses.replace(self, model=None, ema=None)}
        return items if self.ema is None else items | {"ema": self.ema}

    def with_items(self, items: Mapping[str, Any]) -> "TrainState":
        """Return the state with these items; the inverse of ``to_items``."""
        return dataclasses.replace(items["train"], model=items["model"], ema=items.get("ema"))


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    ema: bool = False,
    trainable: Trainable = None,
) -> TrainState:
    """Create the state before the first step.

    The state takes over the arrays of the model. A step that donates its state deletes them, so from then on use
    ``state.model``, not ``model``. If the model is sharded over a mesh, scalars are replicated over it.

    Args:
        model: A module, or any pytree.
        optimizer: Any optax transformation; it sees only the trained leaves.
        key: A typed PRNG key (``jax.random.key``).
        ema: Whether to keep a moving average of the trained leaves; ``ema_decay`` of the step sets its rate.
        trainable: The leaves to train, see ``partition``. Pass the same value to ``make_train_step``.

    Returns:
        A ``TrainState`` at step zero.
    """
    params, _ = partition(model, trainable)
    state = TrainState(
        model=model,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        tokens=Counter.of(0),
        key=key,
        # A copy, as a buffer that occurs twice in a state cannot be donated.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
    return _on_one_mesh(state)


def ema_model(state: TrainState) -> Any:
    """Return the model with its trained leaves replaced by their moving average.

    Raises:
        ValueError: The state has no average.
    """
    if state.ema is None:
        raise ValueError(
            "the state has ema=None. Create it with create_train_state(..., ema=True)."
        )
    return combine(state.ema, state.model)


def abstract(tree: Any) -> Any:
    """Return the tree with each array replaced by its shape, type and sharding."""

    def describe(x: Any) -> Any:
        if not hasattr(x, "dtype"):
            return x
        # A step is compiled for weak types too, such as that of a number in an optimizer's state.
        weak = bool(getattr(x, "weak_type", False))
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(describe, tree)


def _on_one_mesh(state: TrainState) -> TrainState:
    """Replicate leaves that are on one device over the mesh of the other leaves.

    Otherwise the first step would return these leaves with a different placement than it got, and the second step
    would be compiled again.
    """
    arrays = [
        x
        for x in jax.tree.leaves(state)
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    ]
    meshes = [
        x.sharding.mesh
        for x in arrays
        if isinstance(x.sharding, jax.NamedSharding) and x.sharding.mesh.size > 1
    ]
    if not meshes:
        return state
    replicated = jax.NamedSharding(meshes[0], jax.P())

    def place(x: Any) -> Any:
        return (
            jax.device_put(x, replicated)
            if isinstance(x, jax.Array) and len(x.sharding.device_set) == 1
            else x
        )

    return jax.tree.map(place, state)
