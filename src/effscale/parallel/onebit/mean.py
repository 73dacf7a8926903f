"""The error-compensated 1-bit mean: workers compute the mean of their arrays and send one bit per number.

Each worker adds the compression error of the previous step to its numbers and sends their signs, with one scale per tensor.
Each worker is also the server of one part: it averages what all workers sent for that part, adds its own error, and
sends signs again. The compression error is added the next time, so over many steps nothing is lost.

References:
    Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed" (2021).
        https://arxiv.org/abs/2102.02888
    Li et al., "1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with LAMB's Convergence Speed" (2021),
        whose layout (all-to-all, then all-gather) is used here. https://arxiv.org/abs/2104.06069
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
    r"""Return the mean over workers, exchanged in one bit per number each way, and the errors for the next call.

    Worker r adds its error to its numbers, $c_r = x_r + e_r$, and sends $s_r \, \mathrm{sg}(c_r)$, where $\mathrm{sg}$ is
    the sign with $\mathrm{sg}(0) = 1$, and $s_r = \lVert c_r \rVert_2 / \sqrt n$. The server of a part adds its error to the
    mean, $m = \frac{1}{W} \sum_r s_r \mathrm{sg}(c_r) + d$, and sends $S \, \mathrm{sg}(m)$, with S computed like $s_r$. Then
    $e_r \leftarrow c_r - s_r \mathrm{sg}(c_r)$ and $d \leftarrow m - S \, \mathrm{sg}(m)$. Over all steps, the results add up
    to the exact means, except for the last errors:

    $$\sum_t \mathrm{out}_t = \sum_t \frac{1}{W} \sum_r x_{r,t} - \frac{1}{W} \sum_r e_{r,T} - d_T$$

    All tensors are sent together: one all-to-all and one all-gather of bytes (signs, followed by the scales) for the tensors
    that are divided over the same mesh axes. A tensor is padded to whole bytes for each server; padding is never counted.
    If a tensor is divided over other mesh axes, each shard is exchanged in place, and the workers' scales are those of the
    whole tensor.

    Args:
        tree: Arrays that differ between workers, such as momenta or gradients.
        errors: From ``init_error_feedback`` or the previous call. If the mesh has axes other than the workers', divide
            its arrays as ``Residual.spec`` specifies, as ``effscale.parallel.shardings`` does; undivided arrays are correct
            but use more memory.
        axis_name: The workers' axis, bound by ``per_worker`` or ``simulate_workers`` (or ``jax.shard_map``, ``jax.vmap``).
        scales: Number of scales: one per tensor or one per tree.
        specs: A tree of ``jax.P`` like ``tree``: how each array is divided over the other axes. By default, the logical
            axes of an ``nnx.Variable`` determine it, and any other array is not divided.

    Returns:
        The mean, bitwise identical on all workers, in the dtypes of ``tree``; and the errors. With one worker, the
        tree itself: nothing is compressed.

    Raises:
        ValueError: The axis is not bound, ``scales`` is unknown, the mesh has other axes of type Explicit, ``specs`` names
            an axis that arrays cannot be divided over, or the errors belong to another tree or number of workers.

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
        raise ValueError(f"scales must be one of {', '.join(get_args(Scales))}, got {scales!r}")
    num_workers = bound_axis_size(axis_name)
    if num_workers is None:
        raise ValueError(
            f"axis_name must be a bound axis, got {axis_name!r}. Call this inside per_worker(step, {axis_name!r})"
        )
    if (
        num_workers == 1
    ):  # the mean of one worker, with a type that marks it as equal on all workers
        return jax.lax.pmean(as_local(tree, axis_name), axis_name), errors
    check_real(tree)
    mesh = jax.sharding.get_abstract_mesh()
    _check_mesh(mesh, axis_name)
    layouts = tensor_layouts(tree, num_workers, specs)
    for layout in layouts:
        if axis_name in layout.axes:
            raise ValueError(
                f"specs: {layout.spec} for an array of shape {layout.shape} divides it over the workers' axis "
                f"{axis_name!r}. Each worker must hold all of it, or its shard over other axes"
            )
    is_residual = lambda node: isinstance(node, Residual)
    structure = structure_of(tree)
    for name, side in (("worker", errors.worker), ("server", errors.server)):
        if jax.tree.structure(side, is_leaf=is_residual) != structure:
            raise ValueError(f"errors.{name} must have the structure of the tree")
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
    """Raise a ``ValueError`` if the current mesh has other axes that the exchange cannot be divided over."""
    if mesh.empty:
        return
    if not is_manual(axis_name):
        raise ValueError(
            f"the axis {axis_name!r} belongs to a jax.vmap, but a mesh is in use. Call simulate_workers outside of jax.set_mesh, "
            "or run the step with per_worker"
        )
    explicit = [name for name in mesh.explicit_axes if mesh.shape[name] > 1]
    if explicit:
        raise ValueError(
            f"the mesh axis {explicit[0]!r} has the type Explicit. Make it Auto, as MeshConfig does, because the 1-bit mean divides "
            "arrays over it itself"
        )
