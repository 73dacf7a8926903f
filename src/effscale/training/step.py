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

from effscale.models.validation import is_finite
from effscale.parallel.shared_values import settled
from effscale.parallel.workers import as_local, differs, sent_bytes, worker_params
from effscale.training.clipping import Clip, check_clip
from effscale.training.guarded_update import update_if
from effscale.training.loss import Loss, safe_weight
from effscale.training.partition import Trainable, combine, partition
from effscale.training.schedules import Schedule
from effscale.training.state import TrainState

LossFunction = Callable[..., Loss]
"""``loss_fn(model, batch, key) -> Loss``, or ``loss_fn(model, batch, key, frozen)`` where the step is given ``frozen``.

Evaluation passes ``key=None``, which means no dropout.
"""

Metrics = dict[str, Any]


def count_tokens(batch: Any) -> int:
    """Tokens of a batch: the size of ``input_ids``, padding included, or else the number of examples.

    Raises:
        ValueError: The batch holds scalars only, so it has no examples to count.
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
    r"""A training step.

    The gradient is that of the mean over the whole batch,
    $\nabla \sum_m L_m / \sum_m w_m$ over micro-batches m with sums $L_m$ and weights $w_m$,
    which differs from the mean of the micro-batches' means as soon as they hold unequal numbers of tokens.

    The update is skipped if the loss or the gradient is not finite, if the batch has no weight, or if the update would
    make any number of the model or the optimizer state infinite or NaN, as an overflowing learning rate does. Model,
    optimizer state and average then stay bit for bit as they were, on every device alike; ``step`` and ``tokens`` count on,
    as the batch is consumed.

    Args:
        loss_fn: ``loss_fn(model, batch, key) -> Loss``; it gets a fourth argument where the step is given ``frozen``.
        optimizer: Any optax transformation. Its update gets ``tokens=`` (float32, tokens seen before this step).
        accumulate: Number of micro-batches; the leading dimension of the batch must be a multiple. Micro-batch m
            holds rows m, m + accumulate, ..., so that each spans all devices that the batch is sharded over. Scalars of
            the batch go to every micro-batch.
        clip: The greatest global norm of the gradient, ``Clip(1.0)``; None does not clip.
        ema_decay: Rate of the moving average, for a state made with ``ema=True``.
        trainable: Which leaves are trained, as given to ``create_train_state``.
        learning_rate: The schedule, only to be reported as a metric.
        tokens_per_batch: Tokens that a batch adds to the count.
        axis_name: The workers' axis of an optimizer that averages over workers itself (`effscale.optim`), for a step
            within `effscale.parallel.per_worker`. The optimizer gets each worker's own gradient, taken at
            `effscale.parallel.worker_params` and scaled so that the mean over workers is the gradient of the whole
            batch; ``grad_norm`` is then the root mean square of the workers' norms, dropout differs between them, and the
            metric ``sent_bytes`` is what each device sent for the update.

    Returns:
        ``step(state, batch, *, frozen=None) -> (state, metrics)``. Give it to ``ShapeBuckets`` or to ``jax.jit`` with the
        state donated. ``frozen`` is any pytree that the loss reads and nothing trains, such as a teacher or a reference
        model: the loss gets it whole as its fourth argument, for each micro-batch and on each worker. As an argument of
        the compiled program it is neither copied nor built in as a constant. Metrics: ``loss`` (mean), ``grad_norm``
        (before clipping), ``weight``, ``tokens`` (a ``Counter``), ``skipped`` (updates skipped in all),
        ``skipped_in_row``, the means of ``Loss.metrics``, and ``learning_rate`` if a schedule is given.

    Raises:
        ValueError: An option is out of range; or, while tracing, the batch is not a multiple of ``accumulate``,
            the optimizer does not average over the workers of ``axis_name``, or state and ``ema_decay`` disagree.
    """
    if not is_finite(accumulate) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r} must be at least 1")
    check_clip(clip)
    if clip is not None and axis_name is not None:
        raise ValueError(
            f"clip={clip} with axis_name={axis_name!r}: the mean gradient is known to the optimizer only; give clip to it"
        )
    if ema_decay is not None and not (is_finite(ema_decay) and 0 <= ema_decay < 1):
        raise ValueError(f"ema_decay={ema_decay!r} must lie in [0, 1); 0.999 is usual")
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(
        state: TrainState, batch: Any, *, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(
                f"ema_decay={ema_decay} but the state was created with ema={state.ema is not None}; give both or none"
            )
        params, untrained = partition(state.model, trainable)
        key = jax.random.fold_in(state.key, state.step)
        tokens, workers = tokens_per_batch(batch), 1
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            at = worker_params(params, state.opt_state)
            at, rest, frozen = as_local((at, untrained, frozen), axis_name)
        else:
            at, rest = params, untrained
        gradients, loss = _sum_of_gradients(
            loss_fn, at, rest, batch, key, frozen, accumulate, axis_name
        )
        norm = optax.tree.norm(gradients)
        if axis_name is not None:
            total = lambda x: jax.lax.psum(as_local(jnp.asarray(x), axis_name), axis_name)
            loss, tokens = jax.tree.map(total, (loss, tokens))
            workers = jax.lax.axis_size(axis_name)
            norm = jnp.sqrt(total(jnp.square(norm)) * workers)

        weight = safe_weight(loss.weight)
        norm = norm / weight
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm) & (loss.weight > 0)
        scale = workers / weight
        if clip is not None:
            scale = scale * clip.factor(norm)
        gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)

        def update(old: Any) -> Any:
            params, opt_state, ema = old
            # Optax mixes integer counts with floats, which strict dtype promotion would refuse.
            with jax.numpy_dtype_promotion("standard"):
                seen = state.tokens.to_float32()
                take = settled(functools.partial(optimizer.update, tokens=seen), axis_name)
                updates, opt_state = take(gradients, opt_state, params)
            if axis_name and any(differs(u, axis_name) for u in jax.tree.leaves(updates)):
                raise ValueError(
                    f"the optimizer's updates differ between the workers along {axis_name!r}: it does not average; take one "
                    "of effscale.optim with these workers, or put effscale.optim.mean_over_workers before it"
                )
            params = optax.apply_updates(params, updates)
            return params, opt_state, ema if ema_decay is None else _average(ema, params, ema_decay)

        old = params, state.opt_state, state.ema
        (new_params, opt_state, ema), made = update_if(finite, update, old, axis_name)
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
        metrics = _metrics(new_state, loss, norm)
        if axis_name is not None:
            # The state of a step that is skipped is that of the step before it.
            metrics["sent_bytes"] = jnp.where(made, sent_bytes(opt_state), 0.0)
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
    axis_name: str | None = None,
) -> tuple[Any, Loss]:
    """Gradient of the summed loss, in float32, and the sums."""
    given = frozen_argument(frozen)

    def total(params: Any, batch: Any, key: Any) -> tuple[jax.Array, Loss]:
        model = combine(params, untrained)
        changing = _changing_variables(model)
        before = jax.tree.leaves(changing)
        loss = loss_fn(model, batch, key, *given)
        if any(x is not y for x, y in zip(jax.tree.leaves(changing), before, strict=True)):
            raise ValueError(
                "loss_fn changed running statistics or random streams of the model in place, and a step that is traced "
                "loses such changes: use nnx.BatchNorm with use_running_average=True, and give dropout streams of the key "
                "that loss_fn gets, rngs=nnx.Rngs(key)"
            )
        if not isinstance(loss, Loss):
            raise TypeError(
                f"loss_fn returned {type(loss).__name__}; it must return Loss(total, weight, metrics)"
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
    if axis_name is not None:
        zeros = as_local(zeros, axis_name)

    def add(sums: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(*micro_batch)), None

    return jax.lax.scan(add, zeros, (micro_batches, keys))[0]


def frozen_argument(frozen: Any) -> tuple[Any, ...]:
    """The fourth argument of a loss function, which is there only if something is given."""
    return () if frozen is None else (frozen,)


def _changing_variables(model: Any) -> list[nnx.Variable]:
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [v for v in variables if isinstance(v, nnx.BatchStat | nnx.RngState)]


def split_batch(x: Any, accumulate: int) -> jax.Array:
    """[batch, ...] to [accumulate, batch / accumulate, ...], each micro-batch with rows of every device.

    The batch is cut with ``accumulate`` as the minor axis: a sharded leading dimension stays sharded in place, and
    no row moves between devices. A scalar (a coefficient or a key, of no dimensions) has no rows to cut: each micro-batch
    gets it, as [accumulate].
    """
    if not np.ndim(x):
        return jnp.broadcast_to(x, (accumulate,))
    if x.shape[0] % accumulate:
        raise ValueError(
            f"a batch of {x.shape[0]} rows cannot be cut into accumulate={accumulate} micro-batches; "
            f"use a batch that is a multiple of {accumulate}"
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
            f"Loss.metrics uses reserved names: {', '.join(sorted(taken))}; rename them"
        )
    return metrics | loss.means()
