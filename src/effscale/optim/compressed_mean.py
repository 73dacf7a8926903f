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

import dataclasses
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effscale.optim.tensor_layout import (
    Scales,
    TensorLayout,
    axis_names,
    check_real,
    tensor_layouts,
)
from effscale.parallel.workers import (
    as_local,
    bound_axis_size,
    gather,
    has_types,
    is_manual,
    share_mean,
)
from kernels_pallas import sign_compress
from kernels_pallas.manual_axes import vary
from kernels_pallas.sign_compress.reference import quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """The compression error of one tensor, stored as the numbers whose signs were sent.

    Attributes:
        corrected: float32, the sum of the values and the previous error.
        scale: float32 scalar that multiplied the signs.
        spec: How ``corrected`` is divided over the mesh axes other than the workers' axis.
    """

    corrected: Any
    scale: Any
    spec: P = dataclasses.field(default=P(), metadata={"static": True})

    @property
    def error(self) -> jax.Array:
        """``corrected - scale * sign(corrected)``, which is added the next time; undefined in a server's padding."""
        scale = jnp.expand_dims(self.scale, range(self.scale.ndim, self.corrected.ndim))
        corrected = jnp.asarray(self.corrected)  # may be on the host
        return corrected - quantized(corrected, scale)

    def partition_specs(self) -> list[P]:
        """Return the sharding of each array, for ``effscale.parallel.shardings``."""
        return [self.spec, P()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """The errors that a worker keeps: of everything it sends, and of the part for which it is the server.

    Attributes:
        worker: The tree with a ``Residual`` of the same shape in place of each tensor.
        server: The same for the worker's part, padded: [shards, 8, bytes].
    """

    worker: Any
    server: Any

    def resized(self, num_workers: int) -> "ErrorFeedback":
        """Return the errors of all workers, stacked, for another number of workers; see ``effscale.parallel.resize_workers``.

        Each new worker gets the mean of the old workers' errors. The servers' errors are errors of the mean, in parts, and
        are divided again. So the pending error, the mean of the workers' errors plus the servers' errors, carries over.
        """

        def start(error: jax.Array, like: Residual) -> Residual:
            return Residual(error, jnp.zeros((num_workers,), jnp.float32), like.spec)

        worker = jax.tree.map(
            lambda w: start(share_mean(w.error, num_workers), w),
            self.worker,
            is_leaf=_is_residual,
        )
        server = jax.tree.map(
            lambda w, s: start(_divided_again(w, s, num_workers), s),
            self.worker,
            self.server,
            is_leaf=_is_residual,
        )
        return ErrorFeedback(worker, server)


def _is_residual(node: object) -> bool:
    return isinstance(node, Residual)


def _divided_again(worker: Residual, server: Residual, num_workers: int) -> jax.Array:
    """Divide the servers' errors of each shard, without padding, into parts for the new servers."""
    size = worker.corrected[0].size // server.corrected.shape[1]
    shards = jnp.moveaxis(server.error, 1, 0)
    number = shards.shape[0]
    flat = shards.reshape(number, math.prod(shards.shape[1:]))[:, :size]
    width = -(-size // (8 * num_workers))
    padded = jnp.pad(flat, ((0, 0), (0, 8 * width * num_workers - size)))
    return jnp.moveaxis(padded.reshape(number, num_workers, 8, width), 0, 1)


def init_error_feedback(tree: Any, num_workers: int, specs: Any = None) -> ErrorFeedback:
    """Return one worker's errors before the first mean: zeros.

    Args:
        tree: Arrays with the shapes of those to average.
        num_workers: Number of workers.
        specs: As in ``compressed_mean``.

    Example:
        >>> errors = init_error_feedback({"w": jnp.ones((3, 5))}, num_workers=4)
        >>> errors.worker["w"].corrected.shape, errors.server["w"].corrected.shape
        ((3, 5), (1, 8, 1))
    """
    check_real(tree)

    def zeros(shape: tuple[int, ...], spec: P) -> Residual:
        return Residual(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32), spec)

    layouts, structure = tensor_layouts(tree, num_workers, specs), _structure_of(tree)
    worker = [zeros(layout.shape, layout.spec) for layout in layouts]
    server = [zeros((layout.shards, 8, layout.bytes), layout.shard_spec) for layout in layouts]
    return ErrorFeedback(
        jax.tree.unflatten(structure, worker), jax.tree.unflatten(structure, server)
    )


def _structure_of(tree: Any) -> Any:
    """Return the structure of a tree's errors, without the ``nnx.Variable`` around each array.

    ``nnx.Optimizer`` wraps each leaf of a state in a separate variable and unwraps it again; it cannot restore a ``Residual``
    that is inside a variable.
    """
    from flax import nnx

    return jax.tree.structure(nnx.as_pure(tree))


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
        >>> from effscale.parallel import PerWorker, simulate_workers
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
    if num_workers == 1:
        # The mean of one worker, with a type that marks it as equal on all workers.
        return jax.lax.pmean(as_local(tree, axis_name), axis_name), errors
    check_real(tree)
    mesh = jax.sharding.get_abstract_mesh()
    _check_mesh(mesh, axis_name)
    layouts, structure = tensor_layouts(tree, num_workers, specs), _structure_of(tree)
    worker, server = _checked_residuals(errors, layouts, structure, axis_name)
    other_axes = () if mesh.empty else tuple(mesh.auto_axes)
    exchange = _Exchange(layouts, axis_name, num_workers, scales, other_axes)
    if other_axes:
        specs_of_x = [layout.spec for layout in layouts]
        specs_of_worker = [Residual(spec, P(), spec) for spec in specs_of_x]
        specs_of_server = [Residual(x.shard_spec, P(), x.shard_spec) for x in layouts]
        in_and_out = (specs_of_x, specs_of_worker, specs_of_server)
        exchange = jax.shard_map(
            exchange.__call__,
            in_specs=in_and_out,
            out_specs=in_and_out,
            axis_names=set(other_axes),
            check_vma=has_types(axis_name),  # as in the shard_map around it
        )
    means, worker, server = exchange(as_local(jax.tree.leaves(tree), axis_name), worker, server)
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


def _checked_residuals(
    errors: ErrorFeedback, layouts: list[TensorLayout], structure: Any, axis_name: str
) -> tuple[list[Residual], list[Residual]]:
    """Return the residuals of worker and server.

    Raises:
        ValueError: They are those of a different tree or number of workers, or a tensor is divided over the workers' axis.
    """
    sides = []
    for name, side in (("worker", errors.worker), ("server", errors.server)):
        residuals, found = jax.tree.flatten(side, is_leaf=_is_residual)
        if found != structure:
            raise ValueError(f"errors.{name} must have the structure of the tree")
        sides.append(residuals)
    for layout, worker, server in zip(layouts, *sides, strict=True):
        if axis_name in layout.axes:
            raise ValueError(
                f"specs: {layout.spec} for an array of shape {layout.shape} divides it over the workers' axis "
                f"{axis_name!r}. Each worker must hold all of it, or its shard over other axes"
            )
        expected = (layout.shape, (layout.shards, 8, layout.bytes))
        found = (jnp.shape(worker.corrected), jnp.shape(server.corrected))
        if found != expected:
            raise ValueError(
                f"errors of shapes {found} for an array of shape {layout.shape} in {layout.shards} shards among "
                f"{layout.servers} workers, which needs {expected}. They belong to another tree, another number "
                "of workers or another division over mesh axes. An nnx.Optimizer drops the axes of its variables: pass "
                "specs= to the transformation"
            )
    return sides[0], sides[1]


class _Exchange(NamedTuple):
    """The exchange from the view of one device: all arrays are its shards."""

    layouts: list[TensorLayout]
    axis_name: str
    num_workers: int
    scales: Scales
    shard_axes: tuple[str, ...]

    def __call__(
        self, xs: list[Any], worker: list[Residual], server: list[Residual]
    ) -> tuple[list[Any], list[Residual], list[Residual]]:
        """Return the means and the new residuals of worker and server, from the worker's values and its previous residuals."""
        if not self.layouts:
            return [], [], []
        sent = [
            sign_compress.compress(
                self._blocks(layout, x),
                self._blocks(layout, residual.corrected),
                residual.scale,
                size=layout.size,
            )
            for layout, x, residual in zip(self.layouts, xs, worker, strict=True)
        ]
        bits, corrected, squares = zip(*sent, strict=True)
        scales = self._roots(squares, [layout.size for layout in self.layouts])
        worker = [
            Residual(self._shard(layout, c), s, layout.spec)
            for layout, c, s in zip(self.layouts, corrected, scales, strict=True)
        ]
        received = self._send(bits, scales, to_servers=True)

        index = jax.lax.axis_index(self.axis_name)
        sizes = [
            jnp.clip(layout.size - index * (8 * layout.bytes), 0, 8 * layout.bytes)
            for layout in self.layouts
        ]
        averaged = [
            sign_compress.average(*arrived, residual.corrected[0], residual.scale, size)
            for arrived, residual, size in zip(received, server, sizes, strict=True)
        ]
        bits, corrected, squares = zip(*averaged, strict=True)
        scales = self._roots(squares, sizes)
        server = [
            Residual(c[None], s, layout.shard_spec)
            for layout, c, s in zip(self.layouts, corrected, scales, strict=True)
        ]
        received = self._send(bits, scales, to_servers=False)
        means = [
            self._shard(layout, sign_compress.expand(*arrived)).astype(x.dtype)
            for layout, x, arrived in zip(self.layouts, xs, received, strict=True)
        ]
        return means, worker, server

    def _blocks(self, layout: TensorLayout, x: Any) -> Any:
        flat = jnp.ravel(x)
        padding = self.num_workers * 8 * layout.bytes - flat.size
        return jnp.pad(flat, (0, padding)).reshape(self.num_workers, 8, layout.bytes)

    def _shard(self, layout: TensorLayout, blocks: Any) -> Any:
        entries = (*layout.spec, *[None] * len(layout.shape))
        shape = [
            size // _devices(axis_names(entry))
            for size, entry in zip(layout.shape, entries, strict=False)
        ]
        return jnp.ravel(blocks)[: layout.size].reshape(shape)

    def _roots(self, squares: Any, sizes: Any) -> list[Any]:
        """Return the root mean squares of whole tensors (or of the whole tree) from the sums of squares of shards."""
        shards = _devices(self.shard_axes)
        # A tensor that is not divided over an axis is on each device along it, and would be counted that many times.
        totals = jnp.stack(
            [
                jnp.asarray(square) / (shards // layout.shards)
                for square, layout in zip(squares, self.layouts, strict=True)
            ]
        )
        if self.shard_axes:
            totals = jax.lax.psum(vary(totals, self.shard_axes), self.shard_axes)
        counts = jnp.stack(
            [
                jnp.asarray(size, jnp.int32).astype(jnp.float32) * layout.shards
                for size, layout in zip(sizes, self.layouts, strict=True)
            ]
        )
        if self.scales == "tree":
            totals, counts = (jnp.broadcast_to(jnp.sum(x), x.shape) for x in (totals, counts))
        return list(jnp.sqrt(totals / jnp.maximum(counts, 1.0)))

    def _send(self, bits: Any, scales: list[Any], *, to_servers: bool) -> list[tuple[Any, Any]]:
        """Send bits and scales of all tensors to their servers, or from each server to all: [workers, ...] of each."""
        groups: dict[frozenset[str], list[int]] = {}
        for i, layout in enumerate(self.layouts):
            groups.setdefault(layout.group, []).append(i)
        received: dict[int, tuple[Any, Any]] = {}
        for members in groups.values():
            carried = members[:1] if self.scales == "tree" else members
            numbers = jnp.stack([scales[i] for i in carried])
            tail = jax.lax.bitcast_convert_type(numbers, jnp.uint8).reshape(-1)
            if to_servers:
                tail = jnp.broadcast_to(tail, (self.num_workers, tail.size))
            payload = jnp.concatenate([*(bits[i] for i in members), tail], axis=-1)
            if to_servers:
                arrived = jax.lax.all_to_all(payload, self.axis_name, 0, 0)
            else:
                arrived = gather(payload, self.axis_name)
            ends = [
                sum(self.layouts[i].bytes for i in members[: k + 1]) for k in range(len(members))
            ]
            *parts, tail = jnp.split(arrived, ends, axis=1)
            numbers = jax.lax.bitcast_convert_type(
                tail.reshape(self.num_workers, -1, 4), jnp.float32
            )
            for k, (i, part) in enumerate(zip(members, parts, strict=True)):
                received[i] = part, numbers[:, 0 if self.scales == "tree" else k]
        return [received[i] for i in range(len(self.layouts))]


def _devices(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)
