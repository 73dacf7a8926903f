"""The clock of schedules: weights whose bits or masks depend on how many updates were made."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.pruning.weight import PrunedWeight

Tree = TypeVar("Tree")

SCHEDULED = (FakeQuantizedWeight, PrunedWeight)


def at_step(model: Tree, step: Any) -> Tree:
    """A model as its schedules of bits and masks have it after so many updates.

    Masks by magnitude are made when their offset is reached or passed over, of the weights as they then are.

    Args:
        model: Any pytree with fake-quantized or pruned weights in it; all else stays as it is.
        step: Updates made, an integer or an int32 scalar, which may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.quant import BitSchedule, FakeQuantizedWeight, Format
        >>> schedule = BitSchedule(start_bits=8, target_bits=2, period=10)
        >>> w = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
        >>> weight = FakeQuantizedWeight(
        ...     w, Format(bits=2, granularity="tensor"), schedule=schedule, step=jnp.int32(0))
        >>> values = lambda step: jnp.unique(at_step({"w": weight}, step)["w"].dense()).size
        >>> values(0), values(schedule.end)
        (32, 3)
    """
    is_scheduled = lambda node: isinstance(node, SCHEDULED)
    move = lambda node: node.at_step(step) if is_scheduled(node) else node
    return jax.tree.map(move, model, is_leaf=is_scheduled)


def scheduled_step(train_step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    r"""A training step after which the model stands where its schedules of bits and masks are.

    The clock counts updates: a step that is skipped does not advance it.

    Args:
        train_step: From `effscale.training.make_train_step`, or any ``(state, ...) -> (state, metrics)`` whose states have ``model``,
            ``step`` and, if updates may be skipped, ``skipped``, and are dataclasses.

    Returns:
        A step of the same kind, for ``jax.jit``, ``fit`` or ``StagedStep``. It is compiled once for all bits.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from effscale.models import Dense
        >>> from effscale.quant import BitSchedule, Format, Recipe, Rule, fake_quantize_model
        >>> from effscale.training import Loss, create_train_state, make_train_step
        >>> schedule = BitSchedule(start_bits=8, target_bits=4, period=10, offset=5)
        >>> recipe = Recipe((Rule(where="kernel", weights=Format(bits=4), schedule=schedule),))
        >>> model = fake_quantize_model(Dense(8, 4, rngs=nnx.Rngs(0)), recipe)
        >>> def loss(model, x, key):
        ...     return Loss(jnp.square(model(x)).sum(), jnp.float32(x.size))
        >>> state = create_train_state(model, optax.sgd(0.1), key=jax.random.key(0))
        >>> step = jax.jit(scheduled_step(make_train_step(loss, optax.sgd(0.1))))
        >>> state, metrics = step(state, jnp.ones((2, 8)))
        >>> int(state.model.kernel.get_value().step)
        1
    """

    def step(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        new, metrics = train_step(state, *args, **kwargs)
        updates = new.step - getattr(new, "skipped", 0)
        return dataclasses.replace(new, model=at_step(new.model, updates)), metrics

    return step
