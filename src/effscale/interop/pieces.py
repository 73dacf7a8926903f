"""Weights that are filled layer by layer, each directly in its final place."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


class Pieces:
    """An array in pieces as placed on this process's devices, filled layer by layer."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
        self.shape, self.sharding = shape, sharding
        whole = tuple(slice(0, size) for size in shape)
        if sharding is None:
            self.devices = {None: whole}
        else:
            indices = sharding.addressable_devices_indices_map(shape)
            self.devices = {
                device: tuple(
                    slice(*s.indices(n)[:2]) for s, n in zip(index or whole, shape, strict=True)
                )
                for device, index in indices.items()
            }
        # Devices with the same part share one buffer.
        parts = dict.fromkeys(map(_key, self.devices.values()))
        self.buffers = {
            part: _aligned(tuple(stop - start for start, stop in part), dtype) for part in parts
        }

    def put(self, place: tuple[int, ...], array: np.ndarray) -> None:
        """Write the part at ``place`` of the leading dimensions (layer, expert) or, with ``()``, the whole array."""
        for key, buffer in self.buffers.items():
            starts = tuple(start for start, _ in key[: len(place)])
            here = [start <= i < stop for i, (start, stop) in zip(place, key, strict=False)]
            if all(here):
                index = tuple(slice(*bounds) for bounds in key[len(place) :])
                at = tuple(i - start for i, start in zip(place, starts, strict=True))
                buffer[at] = array[index]

    def finish(self) -> jax.Array:
        """Return the array."""
        if self.sharding is None:
            return jax.device_put(self.buffers[_key(self.devices[None])])
        arrays = [
            jax.device_put(self.buffers[_key(index)], device)
            for device, index in self.devices.items()
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


class WeightPieces:
    """A weight, possibly of several arrays, filled layer by layer.

    Args:
        like: Shapes and dtypes of its arrays: a ``jax.ShapeDtypeStruct``, or a structured weight of these.
        shardings: Their shardings, in the same structure; None: the default device.
    """

    def __init__(self, like: Any, shardings: Any):
        shapes, self.structure = jax.tree.flatten(like)
        places = [None] * len(shapes) if shardings is None else jax.tree.leaves(shardings)
        self.arrays = [
            Pieces(shape.shape, np.dtype(shape.dtype), place)
            for shape, place in zip(shapes, places, strict=True)
        ]

    def put(self, place: tuple[int, ...], weight: Any) -> None:
        """Write the weight at ``place`` of the leading dimensions; see ``Pieces.put``."""
        for pieces, array in zip(self.arrays, jax.tree.leaves(weight), strict=True):
            pieces.put(place, array)

    def finish(self) -> Any:
        """Return the weight."""
        return jax.tree.unflatten(self.structure, [pieces.finish() for pieces in self.arrays])


def _key(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in index)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array at an address that XLA's CPU backend uses without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
