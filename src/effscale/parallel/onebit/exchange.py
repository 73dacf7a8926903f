"""The two halves of the 1-bit mean: send signs to the servers, and send the signs of their averages back."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from effscale.parallel.onebit.error_feedback import Residual
from effscale.parallel.onebit.layout import TensorLayout, axis_names
from effscale.parallel.workers import gather
from kernels_pallas import sign_compress
from kernels_pallas.manual_axes import vary

Scales = Literal["tensor", "tree"]
"""``tensor``: one scale per tensor. ``tree``: one scale for the whole tree, as in 1-bit LAMB."""


class Exchange(NamedTuple):
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
        entries = (*layout.spec, *[None] * len(layout.shape))
        shape = [
            size // _devices(axis_names(entry))
            for size, entry in zip(layout.shape, entries, strict=False)
        ]
        return jnp.ravel(blocks)[: layout.size].reshape(shape)

    def _roots(self, squares: Any, sizes: Any) -> list[Any]:
        """Return the root mean squares of whole tensors (or of the whole tree) from the sums of squares of shards."""
        if not len(squares):
            return []
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


def _devices(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)
