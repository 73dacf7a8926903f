"""The state of a training run as one pytree."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from effscale.training.counter import Counter
from effscale.training.partition import Trainable, combine, partition


@runtime_checkable
class CountsSteps(Protocol):
    """What ``fit`` asks of a state: any pytree with ``step``, the batches that it has consumed.

    Two more are used where a state has them: ``tokens``, for the speed, and ``skipped_in_row``, by which checkpoints tell what
    was saved amid skipped updates. Both may be properties.
    """

    @property
    def step(self) -> Any:
        """An integer, or an integer scalar array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training step reads and writes, for one model.

    A state of your own (several models, phases) is any pytree with ``step``; a ``TrainState`` may be a part of it.

    Attributes:
        model: The whole module, frozen leaves included.
        opt_state: State of the optimizer over the trained leaves.
        step: int32 scalar, batches consumed. It advances when an update is skipped, so that data stays in line.
        tokens: Tokens seen, exact (see ``Counter``).
        key: The run's PRNG key. It never changes; a step's key is ``fold_in(key, step)``.
        ema: Exponential moving average of the trained leaves, or None.
        skipped: int32 scalar, updates skipped in all.
        skipped_in_row: int32 scalar, updates skipped since the last one that was made.
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
        """Return the named items of a checkpoint: the model and its average lie apart, so that they can be read alone."""
        items = {"model": self.model, "train": dataclasses.replace(self, model=None, ema=None)}
        return items if self.ema is None else items | {"ema": self.ema}

    def with_items(self, items: Mapping[str, Any]) -> "TrainState":
        """Return the state that has these items; the inverse of ``to_items``."""
        return dataclasses.replace(items["train"], model=items["model"], ema=items.get("ema"))


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    ema: bool = False,
    trainable: Trainable = None,
) -> TrainState:
    """Return the state before the first step.

    The state takes the model's arrays over; a step that donates its state deletes them, so keep using
    ``state.model`` and not ``model``. Where the model is sharded over a mesh, scalars are replicated over it.

    Args:
        model: A module: any pytree.
        optimizer: Any optax transformation; it sees the trained leaves only.
        key: A typed PRNG key (``jax.random.key``).
        ema: Keep a moving average of the trained leaves (the step's ``ema_decay`` sets its rate).
        trainable: Which leaves are trained; see ``partition``. Give the same to ``make_train_step``.

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
        # A copy: a buffer that occurs twice in a state cannot be donated.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
    return _on_one_mesh(state)


def ema_model(state: TrainState) -> Any:
    """Return the model with its trained leaves replaced by their moving average.

    Raises:
        ValueError: The state keeps no average.
    """
    if state.ema is None:
        raise ValueError("the state has ema=None; create it with create_train_state(..., ema=True)")
    return combine(state.ema, state.model)


def abstract(tree: Any) -> Any:
    """Return the tree with each array replaced by its shape, type and sharding."""

    def describe(x: Any) -> Any:
        if not hasattr(x, "dtype"):
            return x
        # A weak type is a part of what a step is compiled for, such as that of a number in an optimizer's state.
        weak = bool(getattr(x, "weak_type", False))
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(describe, tree)


def _on_one_mesh(state: TrainState) -> TrainState:
    """Replicate what lies on one device over the mesh that the other leaves lie on.

    Otherwise the first step would return these leaves with another placement than it got, and the second step
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
