"""The training step: a pure function from a state and a batch to the next state and its metrics."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effscale.options import is_finite
from effscale.parallel.worker_steps import WholeBatch, WorkerAxis
from effscale.training.clipping import Clip, check_clip
from effscale.training.guarded_update import update_if
from effscale.training.loss import Loss, safe_weight
from effscale.training.partition import Trainable, combine, partition
from effscale.training.schedules import Schedule
from effscale.training.state import TrainState

LossFunction = Callable[..., Loss]
"""``loss_fn(model, batch, key) -> Loss``, or ``loss_fn(model, batch, key, frozen)`` if ``frozen`` is passed to the step.

Evaluation passes ``key=None``, which disables dropout.
"""

Metrics = dict[str, Any]


def count_tokens(batch: Any) -> int:
    """Return the number of tokens in a batch: the size of ``input_ids``, including padding, or else the number of examples.

    Raises:
        ValueError: The batch has only scalars, so it has no examples to count.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return batch["input_ids"].size
    rows = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    if not rows:
        raise ValueError("the batch has no array with rows, so its examples cannot be counted")
    return rows[0]


def make_train_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip: Clip | None = None,
    ema_decay: float | None = None,
    trainable: Trainable = None,
    learning_rate: Callable[[Any], Any] | None = None,
    tokens_per_batch: Callable[[Any], Any] = count_tokens,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    r"""Create a training step.

    The gradient is that of the mean over the whole batch,
    $\nabla \sum_m L_m / \sum_m w_m$ over micro-batches m with sums $L_m$ and weights $w_m$,
    which differs from the mean of the micro-batch means if they have unequal numbers of tokens.

    The update is skipped if the loss or the gradient is not finite, if the batch has no weight, or if the update would
    make any number of the model or the optimizer state infinite or NaN, for instance by an overflowing learning rate. Model,
    optimizer state and average then stay bit for bit as they were, on every device; ``step`` and ``tokens`` still advance,
    as the batch is consumed.

    Args:
        loss_fn: ``loss_fn(model, batch, key) -> Loss``; it gets a fourth argument if ``frozen`` is passed to the step.
        optimizer: Any optax transformation. Its update gets ``tokens=`` (float32, the tokens seen before this step).
        accumulate: The number of micro-batches; the leading dimension of the batch must be a multiple. Micro-batch m
            consists of rows m, m + accumulate, ..., so that each spans all devices over which the batch is sharded. Scalars of
            the batch go to every micro-batch.
        clip: The maximum global norm of the gradient, such as ``Clip(1.0)``; None disables clipping.
        ema_decay: The rate of the moving average, for a state created with ``ema=True``.
        trainable: The leaves to train, as passed to ``create_train_state``.
        learning_rate: The schedule, used only to report it as a metric.
        tokens_per_batch: The number of tokens that a batch adds to the count.
        axis_name: The workers' axis of an optimizer that averages over workers itself (``effscale.optim``), for a step
            within ``effscale.parallel.per_worker``. The optimizer gets each worker's separate gradient, taken at
            ``effscale.parallel.worker_params`` and scaled so that the mean over workers is the gradient of the whole
            batch. ``grad_norm`` is then the root mean square of the workers' norms, dropout differs between workers, and the
            metric ``sent_bytes`` is the number of bytes each device sent for the update.

    Returns:
        ``step(state, batch, *, frozen=None) -> (state, metrics)``. Pass it to ``ShapeBuckets`` or to ``jax.jit`` with the
        state donated. ``frozen`` is any pytree that the loss reads without training it, such as a teacher or a reference
        model: the loss gets it as its fourth argument, for each micro-batch and on each worker. As an argument of
        the compiled program it is neither copied nor embedded as a constant. Metrics: ``loss`` (mean), ``grad_norm``
        (before clipping), ``weight``, ``tokens`` (a ``Counter``), ``skipped`` (the total number of skipped updates),
        ``skipped_in_row``, the means of ``Loss.metrics``, and ``learning_rate`` if a schedule is given.

    Raises:
        ValueError: An option is out of range; or, while tracing, the batch is not a multiple of ``accumulate``,
            the optimizer does not average over the workers of ``axis_name``, or state and ``ema_decay`` disagree.
    """
    if not is_finite(accumulate) or accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate!r}")
    check_clip(clip)
    if clip is not None and axis_name is not None:
        raise ValueError(
            f"clip must be None with axis_name={axis_name!r}, got {clip}. Only the optimizer knows the mean gradient, so pass clip to the optimizer."
        )
    if ema_decay is not None and not (is_finite(ema_decay) and 0 <= ema_decay < 1):
        raise ValueError(
            f"ema_decay must be in [0, 1), got {ema_decay!r}. A common value is 0.999."
        )
    optimizer = optax.with_extra_args_support(optimizer)
    reduction = WholeBatch() if axis_name is None else WorkerAxis(axis_name)

    def train_step(
        state: TrainState, batch: Any, *, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(
                f"ema_decay={ema_decay} does not match the state, which was created with ema={state.ema is not None}. Set both or neither."
            )
        params, untrained = partition(state.model, trainable)
        key = reduction.key(jax.random.fold_in(state.key, state.step))
        at = reduction.params(params, state.opt_state)
        rest, frozen = reduction.local((untrained, frozen))
        gradients, loss = _sum_of_gradients(
            loss_fn, at, rest, batch, key, frozen, accumulate, reduction
        )
        norm = reduction.norm(optax.tree.norm(gradients))
        loss, tokens = reduction.total((loss, tokens_per_batch(batch)))

        weight = safe_weight(loss.weight)
        norm = norm / weight
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm) & (loss.weight > 0)
        scale = reduction.workers / weight
        if clip is not None:
            scale = scale * clip.factor(norm)
        gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)

        def update(old: Any) -> Any:
            params, opt_state, ema = old
            # Optax mixes integer counts with floats, which strict dtype promotion does not allow.
            with jax.numpy_dtype_promotion("standard"):
                seen = state.tokens.to_float32()
                take = reduction.update(functools.partial(optimizer.update, tokens=seen))
                updates, opt_state = take(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, ema if ema_decay is None else _average(ema, params, ema_decay)

        old = params, state.opt_state, state.ema
        (new_params, opt_state, ema), made = update_if(finite, update, old, reduction.everywhere)
        skip = (~made).astype(jnp.int32)
        new_state = dataclasses.replace(
            state,
            model=combine(new_params, untrained),
            opt_state=opt_state,
            ema=ema,
            step=state.step + 1,
            tokens=state.tokens.add(tokens),
            skipped=state.skipped + skip,
            skipped_in_row=(state.skipped_in_row + 1) * skip,
        )
        metrics = _metrics(new_state, loss, norm) | reduction.report(opt_state, made)
        if learning_rate is not None:
            by_tokens = isinstance(learning_rate, Schedule) and learning_rate.unit == "tokens"
            count = state.tokens.to_float32() if by_tokens else state.step - state.skipped
            metrics["learning_rate"] = jnp.asarray(learning_rate(count), jnp.float32)
        return new_state, metrics

    return train_step


def _sum_of_gradients(
    loss_fn: LossFunction,
    params: Any,
    untrained: Any,
    batch: Any,
    key: Any,
    frozen: Any,
    accumulate: int,
    reduction: WholeBatch,
) -> tuple[Any, Loss]:
    """Return the gradient of the summed loss, in float32, and the sums."""
    given = frozen_argument(frozen)

    def total(params: Any, batch: Any, key: Any) -> tuple[jax.Array, Loss]:
        model = combine(params, untrained)
        changing = _changing_variables(model)
        before = jax.tree.leaves(changing)
        loss = loss_fn(model, batch, key, *given)
        if any(x is not y for x, y in zip(jax.tree.leaves(changing), before, strict=True)):
            raise ValueError(
                "loss_fn changed running statistics or random streams of the model in place, and a traced step "
                "loses such changes. Use nnx.BatchNorm with use_running_average=True, and create dropout streams from the key "
                "that loss_fn gets, rngs=nnx.Rngs(key)."
            )
        if not isinstance(loss, Loss):
            raise TypeError(
                f"loss_fn must return Loss(total, weight, metrics), got {type(loss).__name__}"
            )
        loss = loss.in_float32()
        return loss.total, loss

    def gradient(batch: Any, key: Any) -> tuple[Any, Loss]:
        gradients, loss = jax.grad(total, has_aux=True)(params, batch, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), loss

    if accumulate == 1:
        return gradient(batch, key)
    micro_batches = jax.tree.map(lambda x: split_batch(x, accumulate), batch)
    keys = jax.random.split(key, accumulate)
    first = jax.tree.map(lambda x: x[0], (micro_batches, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, *first))
    zeros = reduction.local(zeros)

    def add(sums: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(*micro_batch)), None

    return jax.lax.scan(add, zeros, (micro_batches, keys))[0]


def frozen_argument(frozen: Any) -> tuple[Any, ...]:
    """Return the fourth argument of a loss function as a tuple, empty if ``frozen`` is None."""
    return () if frozen is None else (frozen,)


def _changing_variables(model: Any) -> list[nnx.Variable]:
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [v for v in variables if isinstance(v, nnx.BatchStat | nnx.RngState)]


def split_batch(x: Any, accumulate: int) -> jax.Array:
    """Reshape [batch, ...] to [accumulate, batch / accumulate, ...], with rows of every device in each micro-batch.

    The batch is split with ``accumulate`` as the minor axis: a sharded leading dimension stays sharded in place, and
    no row moves between devices. A scalar (a coefficient or a key, without dimensions) has no rows to split: each micro-batch
    gets it, as [accumulate].
    """
    if not np.ndim(x):
        return jnp.broadcast_to(x, (accumulate,))
    if x.shape[0] % accumulate:
        raise ValueError(
            f"the rows of a batch must be a multiple of accumulate={accumulate} micro-batches, "
            f"got {x.shape[0]}"
        )
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // accumulate, accumulate, *x.shape[1:])), 1, 0)


def _average(ema: Any, params: Any, decay: float) -> Any:
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1.0 - decay), ema, params)


def _metrics(state: TrainState, loss: Loss, norm: jax.Array) -> Metrics:
    metrics = {
        "loss": loss.mean(),
        "grad_norm": norm,
        "weight": loss.weight,
        "tokens": state.tokens,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    if taken := metrics.keys() & loss.metrics.keys():
        raise ValueError(
            f"Loss.metrics must not use reserved names, got {', '.join(sorted(taken))}. Rename them."
        )
    return metrics | loss.means()
