"""What the distributed optimizers do to gradients before anything else: check, average, clip, skip."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from effscale.optim.options import check_number
from effscale.optim.params_like import unlike_params
from effscale.parallel.onebit.error_feedback import init_error_feedback
from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.onebit.layout import check_real
from effscale.parallel.onebit.mean import compressed_mean
from effscale.parallel.onebit.traffic import compressed_mean_bytes, mean_bytes
from effscale.parallel.shared_values import settled
from effscale.parallel.worker_zeros import per_worker_zeros
from effscale.parallel.workers import (
    PerWorker,
    as_local,
    bound_axis_size,
    differs,
    has_types,
)

Clip = Literal["synchronised", "local"]
"""By which norm gradients are clipped. ``synchronised``: the root mean square over workers of their norms, one number for all,
also where gradients are averaged; so nothing changes when that ends. It is more than the norm of the mean, up to the root of
the number of workers where noise decides. ``local``: as in DeepSpeed the norm of the mean, and once gradients are no longer
averaged each worker's own: where that is more and binds, the steps become smaller from then on."""


def check_local(gradients: Any, axis_name: str | None) -> None:
    """Raise if gradients are known to be the same on all workers, or if the axis is not bound."""
    if axis_name is None:
        return
    if bound_axis_size(axis_name) is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: take the step within per_worker(step, {axis_name!r}), or leave "
            "axis_name out to train on one worker"
        )
    leaves = jax.tree.leaves(gradients)
    if leaves and has_types(axis_name) and not any(differs(g, axis_name) for g in leaves):
        raise ValueError(
            f"the gradients are the same on all workers along {axis_name!r}, so they were summed already and there is "
            "nothing to compress: differentiate at worker_params(params, opt_state), and do not average yourself. (Instead "
            "of optax.MultiSteps use make_train_step(accumulate=).)"
        )


def mean(gradients: Any, axis_name: str | None) -> Any:
    """The mean over workers, uncompressed; on CPU in float32 at least."""
    if axis_name is None:
        return gradients

    def one(g: jax.Array) -> jax.Array:
        g = as_local(g, axis_name)
        if jnp.dtype(g.dtype).itemsize >= 4:
            return jax.lax.pmean(g, axis_name)
        # XLA's CPU compiler dies of a reduction in a narrow type here, and widens it elsewhere.
        wide = lambda g: jax.lax.pmean(g.astype(jnp.float32), axis_name).astype(g.dtype)
        return jax.lax.platform_dependent(
            g, cpu=wide, default=lambda g: jax.lax.pmean(g, axis_name)
        )

    return jax.tree.map(one, gradients)


def averaged_moments(mean: Any, mu: Any, nu: Any, b1: Any, b2: Any) -> tuple[Any, Any]:
    """Momentum and variance after a step of the warm-up, from the mean gradient in float32 at least."""
    return lerp(mu, mean, b1), lerp(nu, jax.tree.map(jnp.square, mean), b2)


def init_errors(params: Any, axis_name: str | None, num_workers: int | None, specs: Any) -> Any:
    """Each worker's `ErrorFeedback`, in a `PerWorker`; None on one worker."""
    if axis_name is None:
        return None
    make = lambda workers: init_error_feedback(params, workers, specs)
    return unlike_params(params, lambda: per_worker_zeros(make, axis_name, num_workers))


def agree(
    tree: Any, errors: PerWorker | None, *, scales: Scales, specs: Any
) -> tuple[Any, PerWorker | None]:
    """The mean over workers in one bit a number; the tree itself on one worker."""
    if errors is None:
        return tree, None
    axis_name = errors.axis_name
    tree, new = compressed_mean(tree, errors.value, axis_name, scales=scales, specs=specs)
    return tree, PerWorker(new, axis_name)


def bytes_sent(
    gradients: Any, axis_name: str | None, scales: Scales, specs: Any
) -> tuple[float, float]:
    """Bytes that a device sends for the mean in full and in one bit a number; nothing where there is one worker."""
    workers = 1 if axis_name is None else bound_axis_size(axis_name)
    if workers is None or workers == 1:
        return 0.0, 0.0
    full = mean_bytes(gradients, workers, specs=specs)
    return full, compressed_mean_bytes(gradients, workers, scales=scales, specs=specs)


def squared_norm(tree: Any) -> jax.Array:
    """Sum of squares of all entries, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def mean_squared_norm(gradients: Any, axis_name: str | None) -> jax.Array:
    """The mean over workers of `squared_norm`: finite only if all gradients of all workers are."""
    square = squared_norm(gradients)
    return square if axis_name is None else jax.lax.pmean(as_local(square, axis_name), axis_name)


def clipped(gradients: Any, squared: jax.Array, clip_norm: Any) -> Any:
    """The gradients times what makes a norm of ``sqrt(squared)`` at most ``clip_norm``."""
    if clip_norm is None:
        return gradients
    factor = clip_norm / jnp.maximum(jnp.sqrt(squared), clip_norm)
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), gradients)


def clipped_locally(gradients: Any, axis_name: str | None, clip_norm: Any, clip: Clip) -> Any:
    """Clip the gradient of each worker, by the norm that `Clip` says."""
    if clip_norm is None:
        return gradients
    by_all = clip == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(gradients)
    return clipped(gradients, squared, clip_norm)


def clipped_mean(gradients: Any, axis_name: str | None, clip_norm: Any, clip: Clip) -> Any:
    """The mean over workers, uncompressed, in float32 at least, clipped by the norm that `Clip` says."""
    g = in_float32(mean(gradients, axis_name))
    if clip_norm is None:
        return g
    by_all = clip == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(g)
    return clipped(g, squared, clip_norm)


def check_clip(clip_norm: Any, clip: str) -> None:
    """Raise a ``ValueError`` for options out of range."""
    check_number("clip_norm", clip_norm, lambda c: c > 0, "be positive; None does not clip")
    if clip not in get_args(Clip):
        raise ValueError(f"clip={clip!r} is unknown; one of {', '.join(get_args(Clip))}")


class MeanOverWorkersState(NamedTuple):
    """State of `mean_over_workers`.

    Attributes:
        sent: float32, bytes that each worker's device sent in the last update, by formula.
        axis: Nothing; it tells `effscale.parallel.worker_params` the axis.
    """

    sent: Any
    axis: PerWorker


def check_axis(axis_name: Any) -> None:
    """Raise a ``ValueError`` unless the workers lie along one named axis, or there is one worker."""
    if axis_name is not None and not isinstance(axis_name, str):
        raise ValueError(
            f"axis_name={axis_name!r} must be the name of one mesh axis. The compiler averages over all other axes, in full; "
            "to compress over several, give the mesh one axis of their product"
        )


def check_workers(axis_name: str | None, num_workers: int | None, scales: str) -> None:
    """Raise a ``ValueError`` for options of the exchange that do not go together."""
    check_axis(axis_name)
    if axis_name is None and num_workers is not None:
        raise ValueError(
            f"num_workers={num_workers} without axis_name: name the workers' axis, or leave num_workers out"
        )
    if scales not in get_args(Scales):
        raise ValueError(f"scales={scales!r} is unknown; one of {', '.join(get_args(Scales))}")


def mean_over_workers(axis_name: str) -> optax.GradientTransformationExtraArgs:
    """The uncompressed mean over workers, as the first link of any optimizer within `effscale.parallel.per_worker`.

    What crosses the network is of the gradients' type; on CPU it is float32 where that type is narrower.

    >>> adam = optax.chain(mean_over_workers("data"), optax.adam(1e-3))
    """
    check_axis(axis_name)

    def init(params: Any) -> Any:
        del params
        return MeanOverWorkersState(jnp.zeros((), jnp.float32), PerWorker((), axis_name))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        check_local(updates, axis_name)
        sent, _ = bytes_sent(updates, axis_name, "tensor", None)
        return mean(updates, axis_name), MeanOverWorkersState(jnp.float32(sent), state.axis)

    return optax.GradientTransformationExtraArgs(init, update)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: updates skipped so far (int32), and the inner state."""

    skipped: jax.Array
    inner: Any


def skip_nonfinite(
    inner: optax.GradientTransformation, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip the update, on all workers, if any gradient of any worker is not finite.

    Updates are then zero and the inner state (moments, counters, errors) stays bit for bit as it was. The decision
    costs one number a worker on the network. Gradients so large that their squares overflow float32 count as not finite.

    Args:
        inner: Any optax transformation.
        axis_name: The workers' axis; None on one worker.

    Example:
        >>> optimizer = skip_nonfinite(optax.sgd(0.1))
        >>> updates, state = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(jnp.zeros(2)))
        >>> updates.tolist(), int(state.skipped)
        ([0.0, 0.0], 1)
    """
    check_axis(axis_name)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return SkipNonfiniteState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        check_local(updates, axis_name)
        finite = jnp.isfinite(mean_squared_norm(updates, axis_name))

        def take() -> Any:
            step = settled(functools.partial(inner.update, **extra), axis_name)
            return step(updates, state.inner, params)

        def skip() -> Any:
            return jax.tree.map(zeros_of_mean, updates), state.inner

        new_updates, new_inner = jax.lax.cond(finite, take, skip)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        return new_updates, SkipNonfiniteState(skipped, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def zeros_of_mean(x: Any) -> jax.Array:
    """Zeros like an array, of a type that is the same on all workers."""
    sharding = jax.typeof(x).sharding  # of axes of type Explicit; empty for all others
    divided = any(entry is not None for entry in sharding.spec)
    return jnp.zeros(jnp.shape(x), x.dtype, device=sharding if divided else None)


def moments_like(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Zeros in at least float32, in which second moments that decay by 0.999 do not stand still; or in a given type."""
    check_real(params)
    type_of = lambda p: _at_least_float32(p.dtype) if dtype is None else dtype
    return jax.tree.map(lambda p: jnp.zeros_like(p, type_of(p)), params)


def check_mu_dtype(mu_dtype: DTypeLike | None) -> None:
    """Raise a ``ValueError`` for a type in which no momentum can be kept."""
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise ValueError(f"mu_dtype={mu_dtype!r} must be a floating-point type, or None")


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def in_float32(tree: Any) -> Any:
    """The tree in at least float32."""
    return jax.tree.map(lambda x: x.astype(_at_least_float32(x.dtype)), tree)


def in_types_of(like: Any, tree: Any) -> Any:
    """The tree in the types of another."""
    return jax.tree.map(lambda a, x: x.astype(a.dtype), like, tree)


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``: what an average that began at zero is divided by after ``count`` updates, as in Adam."""
    return 1 - decay ** count.astype(jnp.float32)


def corrected(moments: Any, correction: Any) -> Any:
    """The moments divided by their `bias_correction`."""
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moments)


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, which does not ask for the parameters where the decay is known to be zero."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def is_zero(weight_decay: Any) -> bool:
    """Whether a weight decay is known to be zero; one that is injected never is."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def where_known(mu: Any, nu: Any) -> Any:
    """The momentum, and zero where the variance is zero.

    One bit cannot say zero. What never had a gradient would be told plus or minus the scale, and divided by nothing but epsilon.
    """
    return jax.tree.map(lambda m, v: jnp.where(v > 0, m, jnp.zeros_like(m)), mu, nu)


def normalised(mu: Any, nu: Any, eps: Any) -> Any:
    """Momentum by the root of the variance, of an array. Zero by zero is zero, also without an epsilon: there was no gradient."""
    return mu / jnp.where(nu > 0, jnp.sqrt(nu) + eps, 1.0)


def lerp(old: Any, new: Any, decay: Any) -> Any:
    """``decay * old + (1 - decay) * new`` in the type of ``old``."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b.astype(a.dtype), old, new)


def masked(tree: Any, mask: Any, params: Any) -> Any:
    """The tree times a mask: None, a tree like it (or a function from the parameters to one) of arrays that broadcast."""
    if mask is None:
        return tree
    structure = jax.tree.structure(mask)
    # A module is a tree, and may be called, too; a function is a leaf.
    if callable(mask) and (structure.num_nodes == 1 or structure != jax.tree.structure(tree)):
        if params is None:
            raise ValueError(
                "exp_avg_mask is a function of the parameters: optimizer.update(gradients, state, params)"
            )
        mask = mask(params)
    return jax.tree.map(lambda x, m: x * jnp.broadcast_to(m, x.shape).astype(x.dtype), tree, mask)
