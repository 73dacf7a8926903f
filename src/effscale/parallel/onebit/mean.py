"""The error-compensated 1-bit mean: workers agree on the mean of what each holds and send one bit per number.

A worker adds to its numbers the error of the last time and sends their signs, with one scale a tensor. Each worker is the
server of a part: it averages what all sent for that part, adds its own error, and sends signs again. What the signs left
out comes back the next time, so that over many steps nothing is lost.

Source: Tang et al., 1-bit Adam, 2021 (arXiv:2102.02888), and Li et al., 1-bit LAMB, 2021 (arXiv:2104.06069), whose
layout (all-to-all, then all-gather) this is.
"""

from typing import Any, get_args

import jax
from jax.sharding import PartitionSpec as P

from effscale.parallel.onebit.error_feedback import (
    ErrorFeedback,
    Residual,
    check_errors,
    structure_of,
)
from effscale.parallel.onebit.exchange import Exchange, Scales
from effscale.parallel.onebit.layout import check_real, tensor_layouts
from effscale.parallel.workers import as_local, bound_axis_size, has_types, is_manual


def compressed_mean(
    tree: Any,
    errors: ErrorFeedback,
    axis_name: str,
    *,
    scales: Scales = "tensor",
    specs: Any = None,
) -> tuple[Any, ErrorFeedback]:
    r"""The mean over workers in one bit per number each way, and the errors for the next time.

    With $\mathrm{sg}(0) = 1$, worker r sends $s_r \, \mathrm{sg}(c_r)$ of $c_r = x_r + e_r$, where
    $s_r = \lVert c_r \rVert_2 / \sqrt n$. The server of a part sends $S \, \mathrm{sg}(m)$ of
    $m = \frac{1}{W} \sum_r s_r \mathrm{sg}(c_r) + d$, S likewise. Then $e_r \leftarrow c_r - s_r
    \mathrm{sg}(c_r)$, $d \leftarrow m - S \, \mathrm{sg}(m)$. So of all steps together

    $$\sum_t \mathrm{out}_t = \sum_t \frac{1}{W} \sum_r x_{r,t} - \frac{1}{W} \sum_r e_{r,T} - d_T$$

    All tensors go together: an all-to-all and an all-gather of bytes (signs, and behind them the scales) for the tensors
    that are divided over the same mesh axes. A tensor is padded to whole bytes for each server; padding counts nowhere.
    Of a tensor that is divided over other mesh axes each shard is exchanged where it lies; the workers' scales are those of
    the whole tensor.

    Args:
        tree: Arrays, different on each worker: momenta, gradients.
        errors: From `init_error_feedback` or the last call. With other axes than the workers' in the mesh its arrays
            should be divided as `Residual.spec` says, as `effscale.parallel.shardings` does: undivided ones are correct
            and take more memory.
        axis_name: The workers' axis, bound by `per_worker` or `simulate_workers` (or `jax.shard_map`, `jax.vmap`).
        scales: How many scales there are.
        specs: A tree of `jax.P` like ``tree``: how each array is divided over the other axes. By default the logical
            axes of an ``nnx.Variable`` say it, and any other array counts as whole.

    Returns:
        The mean, the same bit for bit on all workers, in the types of ``tree``; and the errors. With one worker, the
        tree itself: nothing is compressed.

    Raises:
        ValueError: The axis is not bound, ``scales`` is unknown, the mesh has other axes of type Explicit, ``specs`` names
            an axis that arrays cannot be divided over, or the errors are those of another tree or of another number of
            workers.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.parallel import PerWorker, init_error_feedback, simulate_workers
        >>> def step(errors, x):
        ...     mean, errors_ = compressed_mean(x, errors.value, "data")
        ...     return mean, PerWorker(errors_, "data")
        >>> x = jnp.array([[1.0, -1.0], [3.0, -3.0]])
        >>> errors = jax.tree.map(lambda e: jnp.stack([e, e]), init_error_feedback(x[:1], 2))
        >>> mean, errors = simulate_workers(step, 2)(PerWorker(errors, "data"), x)
        >>> mean.tolist()
        [[2.0, -2.0]]
    """
    if scales not in get_args(Scales):
        raise ValueError(f"scales={scales!r} is unknown; one of {', '.join(get_args(Scales))}")
    num_workers = bound_axis_size(axis_name)
    if num_workers is None:
        raise ValueError(
            f"the axis {axis_name!r} is not bound here: call this within per_worker(step, {axis_name!r})"
        )
    if num_workers == 1:  # the mean of one, of a type that says that all workers hold it
        return jax.lax.pmean(as_local(tree, axis_name), axis_name), errors
    check_real(tree)
    mesh = jax.sharding.get_abstract_mesh()
    _check_mesh(mesh, axis_name)
    layouts = tensor_layouts(tree, num_workers, specs)
    for layout in layouts:
        if axis_name in layout.axes:
            raise ValueError(
                f"specs: {layout.spec} for an array of shape {layout.shape} divides it over the workers' axis "
                f"{axis_name!r}: each worker holds all of it, or its shard over other axes"
            )
    is_residual = lambda node: isinstance(node, Residual)
    structure = structure_of(tree)
    for name, side in (("worker", errors.worker), ("server", errors.server)):
        if jax.tree.structure(side, is_leaf=is_residual) != structure:
            raise ValueError(f"errors.{name} was made for a tree of another structure")
    xs = as_local(jax.tree.leaves(tree), axis_name)
    worker = jax.tree.leaves(errors.worker, is_leaf=is_residual)
    server = jax.tree.leaves(errors.server, is_leaf=is_residual)
    check_errors(layouts, worker, server)

    shard_axes = () if mesh.empty else tuple(mesh.auto_axes)

    def exchange(xs: Any, worker: Any, server: Any) -> Any:
        return Exchange(layouts, axis_name, num_workers, scales, shard_axes)(xs, worker, server)

    if shard_axes:
        specs_of_x = [layout.spec for layout in layouts]
        specs_of_worker = [Residual(layout.spec, P(), layout.spec) for layout in layouts]
        specs_of_server = [
            Residual(layout.shard_spec, P(), layout.shard_spec) for layout in layouts
        ]
        exchange = jax.shard_map(
            exchange,
            in_specs=(specs_of_x, specs_of_worker, specs_of_server),
            out_specs=(specs_of_x, specs_of_worker, specs_of_server),
            axis_names=set(shard_axes),
            check_vma=has_types(axis_name),  # as in the shard_map around it
        )
    means, worker, server = exchange(xs, worker, server)
    return jax.tree.unflatten(jax.tree.structure(tree), means), ErrorFeedback(
        jax.tree.unflatten(structure, worker), jax.tree.unflatten(structure, server)
    )


def _check_mesh(mesh: Any, axis_name: str) -> None:
    """Raise a ``ValueError`` for a mesh in use whose other axes the exchange cannot be divided over."""
    if mesh.empty:
        return
    if not is_manual(axis_name):
        raise ValueError(
            f"the axis {axis_name!r} is a jax.vmap's, and a mesh is in use: call simulate_workers outside of jax.set_mesh, "
            "or run the step by per_worker"
        )
    explicit = [name for name in mesh.explicit_axes if mesh.shape[name] > 1]
    if explicit:
        raise ValueError(
            f"the mesh's axis {explicit[0]!r} is of type Explicit: make it Auto, as MeshConfig does; the 1-bit mean divides "
            "arrays over it by itself"
        )
