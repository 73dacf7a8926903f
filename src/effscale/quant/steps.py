"""Advance schedules: weights whose bits or masks depend on the number of optimizer steps."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.pruning.weight import PrunedWeight

Tree = TypeVar("Tree")

SCHEDULED = (FakeQuantizedWeight, PrunedWeight)


def at_step(model: Tree, step: Any) -> Tree:
    """Return a model with its bit and mask schedules advanced to a step.

    Magnitude masks are computed when their offset is reached or passed, from the weights at that time.

    Args:
        model: Any pytree that contains fake-quantized or pruned weights; everything else is unchanged.
        step: Optimizer steps completed: an integer or an int32 scalar, which may be traced.

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
    r"""Wrap a training step so that it advances the model's bit and mask schedules.

    Schedules count optimizer updates: a skipped step does not advance them.

    Args:
        train_step: A step from ``effscale.training.make_train_step``, or any ``(state, ...) -> (state, metrics)``
            whose states are dataclasses with ``model``, ``step`` and, if updates may be skipped, ``skipped``.

    Returns:
        A step with the same signature, for ``jax.jit``, ``fit`` or ``StagedStep``. It is compiled once for all bits.

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
