"""The error-compensated 1-bit mean: workers agree on the mean of what each holds and send one bit a number.

A worker adds to its numbers the error of the last time and sends their signs, with one scale a tensor. Each worker is the
server of a part: it averages what all sent for that part, adds its own error, and sends signs again. What the signs left
out comes back the next time, so that over many steps nothing is lost.

Source: Tang et al., 1-bit Adam, 2021 (arXiv:2102.02888), and Li et al., 1-bit LAMB, 2021 (arXiv:2104.06069), whose
layout (all-to-all, then all-gather) this is.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effscale.parallel.placement import shardings
from effscale.parallel.workers import as_local, bound_axis_size, gather
from kernels_pallas import sign_compress
from kernels_pallas.manual_axes import vary

Scales = Literal["tensor", "tree"]
"""``tensor``: one scale for each tensor. ``tree``: one for all of a tree, as 1-bit LAMB has it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """What is left of a tensor after its signs were sent, kept as the numbers whose signs they were.

    Attributes:
        corrected: float32, the numbers: values and last error in sum.
        scale: float32 scalar, what the signs were multiplied by.
        spec: How ``corrected`` is divided over the mesh axes other than the workers'.
    """

    corrected: Any
    scale: Any
    spec: P = dataclasses.field(default=P(), metadata={"static": True})

    @property
    def error(self) -> jax.Array:
        """``corrected - scale * sign(corrected)``, which is added the next time; in a server's padding it means nothing."""
        scale = jnp.expand_dims(self.scale, range(self.scale.ndim, self.corrected.ndim))
        return self.corrected - jnp.where(self.corrected >= 0, scale, -scale)

    def partition_specs(self) -> list[P]:
        """How each array is divided, for `effscale.parallel.shardings`."""
        return [self.spec, P()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """The errors that a worker keeps: of all it sends, and of the part that it is the server of.

    Attributes:
        worker: The tree with a `Residual` of the same shape in the place of each tensor.
        server: The same with the worker's part: [shards, 8, bytes], padded.
    """

    worker: Any
    server: Any


def init_error_feedback(tree: Any, num_workers: int, specs: Any = None) -> ErrorFeedback:
    """One worker's errors before the first mean: zeros.

    Args:
        tree: Arrays like those to be averaged.
        num_workers: Workers that take part.
        specs: See `compressed_mean`.

    Example:
        >>> errors = init_error_feedback({"w": jnp.ones((3, 5))}, num_workers=4)
        >>> errors.worker["w"].corrected.shape, errors.server["w"].corrected.shape
        ((3, 5), (1, 8, 1))
    """
    pairs = [_zeros(layout) for layout in tensor_layouts(tree, num_workers, specs)]
    worker, server = zip(*pairs, strict=True) if pairs else ((), ())
    structure = jax.tree.structure(tree)
    return ErrorFeedback(
        jax.tree.unflatten(structure, worker), jax.tree.unflatten(structure, server)
    )


def compressed_mean(
    tree: Any,
    errors: ErrorFeedback,
    axis_name: str,
    *,
    scales: Scales = "tensor",
    specs: Any = None,
) -> tuple[Any, ErrorFeedback]:
    r"""The mean over workers in one bit a number each way, and the errors for the next time.

    With :math:`\mathrm{sg}(0) = 1`, worker r sends :math:`s_r \, \mathrm{sg}(c_r)` of :math:`c_r = x_r + e_r`, where
    :math:`s_r = \lVert c_r \rVert_2 / \sqrt n`. The server of a part sends :math:`S \, \mathrm{sg}(m)` of
    :math:`m = \frac{1}{W} \sum_r s_r \mathrm{sg}(c_r) + d`, S likewise. Then :math:`e_r \leftarrow c_r - s_r
    \mathrm{sg}(c_r)`, :math:`d \leftarrow m - S \, \mathrm{sg}(m)`. So of all steps together

    .. math:: \sum_t \mathrm{out}_t = \sum_t \frac{1}{W} \sum_r x_{r,t} - \frac{1}{W} \sum_r e_{r,T} - d_T

    All tensors go together: an all-to-all and an all-gather of bytes (signs, and behind them the scales) for the tensors
    that are divided over the same mesh axes. A tensor is padded to whole bytes for each server; padding counts nowhere.
    Of a tensor that is divided over other mesh axes each shard is exchanged where it lies; the workers' scales are those of
    the whole tensor.

    Args:
        tree: Arrays, different on each worker: momenta, gradients.
        errors: From `init_error_feedback` or the last call. With other axes than the workers' in the mesh its arrays
            must be divided as `Residual.spec` says, as `effscale.parallel.shardings` does.
        axis_name: The workers' axis, bound by `per_worker` or `simulate_workers` (or `jax.shard_map`, `jax.vmap`).
        scales: How many scales there are.
        specs: A tree of `jax.P` like ``tree``: how each array is divided over the other axes. By default the logical
            axes of an ``nnx.Variable`` say it, and any other array counts as whole.

    Returns:
        The mean, the same bit for bit on all workers, in the types of ``tree``; and the errors. With one worker, the
        tree itself: nothing is compressed.

    Raises:
        ValueError: The axis is not bound, ``scales`` is unknown, or the errors are those of another tree or of another
            number of workers.

    Example:
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
        raise ValueError(f"scales={scales!r} is unknown; one of {', '.join(get_args(Scales))}")
    num_workers = bound_axis_size(axis_name)
    if num_workers is None:
        raise ValueError(
            f"the axis {axis_name!r} is not bound here: call this within per_worker(step, {axis_name!r})"
        )
    if num_workers == 1:  # the mean of one, of a type that says that all workers hold it
        return jax.lax.pmean(as_local(tree, axis_name), axis_name), errors
    layouts = tensor_layouts(tree, num_workers, specs)
    is_residual = lambda node: isinstance(node, Residual)
    structure = jax.tree.structure(tree)
    for name, side in (("worker", errors.worker), ("server", errors.server)):
        if jax.tree.structure(side, is_leaf=is_residual) != structure:
            raise ValueError(f"errors.{name} was made for a tree of another structure")
    xs = as_local(jax.tree.leaves(tree), axis_name)
    worker = jax.tree.leaves(errors.worker, is_leaf=is_residual)
    server = jax.tree.leaves(errors.server, is_leaf=is_residual)
    _check(layouts, worker, server)

    shard_axes = () if _mesh().empty else tuple(_mesh().auto_axes)

    def exchange(xs: Any, worker: Any, server: Any) -> Any:
        return _Exchange(layouts, axis_name, num_workers, scales, shard_axes)(xs, worker, server)

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
        )
    means, worker, server = exchange(xs, worker, server)
    return jax.tree.unflatten(structure, means), ErrorFeedback(
        jax.tree.unflatten(structure, worker), jax.tree.unflatten(structure, server)
    )


class TensorLayout(NamedTuple):
    """How one tensor is cut: into shards over other mesh axes, and each shard into a part for each server."""

    shape: tuple[int, ...]
    spec: P
    axes: tuple[str, ...]
    shards: int
    servers: int

    @property
    def size(self) -> int:
        """Elements of a shard."""
        return math.prod(self.shape) // self.shards

    @property
    def bytes(self) -> int:
        """Bytes of a server's part of a shard."""
        return -(-self.size // (8 * self.servers))

    @property
    def shard_spec(self) -> P:
        """How [shards, ...] is divided."""
        return P(self.axes) if self.axes else P()


def _mesh() -> Any:
    return jax.sharding.get_abstract_mesh()


def tensor_layouts(tree: Any, num_workers: int, specs: Any = None) -> list[TensorLayout]:
    """The layout of each tensor, on the mesh in use."""
    leaves, mesh = jax.tree.leaves(tree), _mesh()
    if mesh.empty:
        flat = [P()] * len(leaves)
    elif specs is None:
        flat = [sharding.spec for sharding in jax.tree.leaves(shardings(tree, mesh))]
    else:
        flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
        if len(flat) != len(leaves):
            raise ValueError(f"specs has {len(flat)} entries for {len(leaves)} arrays")
    return [
        _layout(jnp.shape(x), spec, mesh, num_workers) for x, spec in zip(leaves, flat, strict=True)
    ]


def _layout(shape: tuple[int, ...], spec: P, mesh: Any, num_workers: int) -> TensorLayout:
    shards, axes = 1, []
    for size, entry in zip(shape, spec, strict=False):
        names = _names(entry)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(f"an array of shape {shape} cannot be divided as {spec} says")
        axes.extend(names)
        shards *= parts
    entries = tuple(spec)
    while entries and entries[-1] is None:  # two specs that mean the same are not equal
        entries = entries[:-1]
    return TensorLayout(tuple(shape), P(*entries), tuple(axes), shards, num_workers)


def _zeros(layout: TensorLayout) -> tuple[Residual, Residual]:
    def zeros(shape: tuple[int, ...], spec: P) -> Residual:
        return Residual(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32), spec)

    return (
        zeros(layout.shape, layout.spec),
        zeros((layout.shards, 8, layout.bytes), layout.shard_spec),
    )


def _check(layouts: list[TensorLayout], worker: list[Residual], server: list[Residual]) -> None:
    for layout, at_worker, at_server in zip(layouts, worker, server, strict=True):
        expected = (layout.shape, (layout.shards, 8, layout.bytes))
        found = (jnp.shape(at_worker.corrected), jnp.shape(at_server.corrected))
        if found != expected:
            raise ValueError(
                f"errors of shapes {found} for an array of shape {layout.shape} in {layout.shards} shards among "
                f"{layout.servers} workers, which needs {expected}: they are those of another tree or another number "
                "of workers"
            )


class _Exchange(NamedTuple):
    """The exchange as one device sees it: all arrays are its shards."""

    layouts: list[TensorLayout]
    axis_name: str
    num_workers: int
    scales: Scales
    shard_axes: tuple[str, ...]

    def __call__(
        self, xs: list[Any], worker: list[Residual], server: list[Residual]
    ) -> tuple[list[Any], list[Residual], list[Residual]]:
        sent = [
            sign_compress.compress(
                self._blocks(layout, x),
                self._blocks(layout, residual.corrected),
                residual.scale,
                size=layout.size,
            )
            for layout, x, residual in zip(self.layouts, xs, worker, strict=True)
        ]
        bits, corrected, squares = zip(*sent, strict=True) if sent else ((), (), ())
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
        bits, corrected, squares = zip(*averaged, strict=True) if averaged else ((), (), ())
        scales = self._roots(squares, sizes)
        server = [
            Residual(c[None], s, layout.shard_spec)
            for layout, c, s in zip(self.layouts, corrected, scales, strict=True)
        ]
        means = [
            self._shard(layout, sign_compress.expand(*arrived)).astype(x.dtype)
            for layout, x, arrived in zip(
                self.layouts, xs, self._send(bits, scales, to_servers=False), strict=True
            )
        ]
        return means, worker, server

    def _blocks(self, layout: TensorLayout, x: Any) -> Any:
        flat = jnp.ravel(x)
        padding = self.num_workers * 8 * layout.bytes - flat.size
        return jnp.pad(flat, (0, padding)).reshape(self.num_workers, 8, layout.bytes)

    def _shard(self, layout: TensorLayout, blocks: Any) -> Any:
        shape = [
            size // math.prod(_mesh().shape[axis] for axis in _names(entry))
            for size, entry in zip(
                layout.shape, (*layout.spec, *[None] * len(layout.shape)), strict=False
            )
        ]
        return jnp.ravel(blocks)[: layout.size].reshape(shape)

    def _roots(self, squares: Any, sizes: Any) -> list[Any]:
        """Root mean squares of whole tensors (or of the whole tree) from the sums of squares of shards."""
        if not len(squares):
            return []
        shards = math.prod(_mesh().shape[axis] for axis in self.shard_axes)
        # A tensor that is not divided over an axis is on each of its devices, and would count as often.
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
        """Bits and scales of all tensors, from each to its server or from each server to all: [workers, ...] of each."""
        groups: dict[frozenset[str], list[int]] = {}
        for i, layout in enumerate(self.layouts):
            groups.setdefault(frozenset(layout.axes), []).append(i)
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


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
