"""Matrices of codes with scales, the intermediate form between the layout of a file and that of a packed weight."""

import dataclasses
from typing import Any

import jax
import numpy as np

from effscale.interop.tensors import FolderError, ToOurs
from effscale.quant.formats import Format, pack, unpack
from effscale.quant.packed import PackedWeight, check_packable, packed_of_arrays
from effscale.quant.quantizers import grouped_shape

_pack = jax.jit(pack, static_argnums=1)
_unpack = jax.jit(unpack, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class CodedTensor:
    """A tensor of a file as codes with scales; see ``effscale.interop.tensors.StructuredTensor``.

    Attributes:
        codes: int8, ``(out, in)``.
        scale: float32, ``(out, groups)``: one group per output, or groups of consecutive inputs.
        zero: float32, same shape as ``scale``: the offset to add; None for symmetric formats.
        format: A format with granularity ``channel`` or ``group``.
        activations: As in ``effscale.quant.PackedWeight``.
        is_table: Whether it is an embedding table, with rows in place of outputs.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    format: Format
    activations: Format | None = None
    is_table: bool = False

    def weights(self, to_ours: ToOurs, dtype: np.dtype) -> tuple[PackedWeight, ...]:
        """Return packed weights, one for each parameter that the tensor fills."""
        codes = to_ours(self.codes)
        scales = [self._scales(array) for array in to_ours(self.scale)]
        zeros = [None] * len(codes)
        if self.zero is not None:
            zeros = [self._scales(array) for array in to_ours(self.zero)]
        return tuple(
            packed_of_arrays(
                self._packed(self._kernel(one).T),
                scale,
                zero,
                format=self.format,
                activations=self.activations,
                is_table=self.is_table,
                dtype=dtype,
            )
            for one, scale, zero in zip(codes, scales, zeros, strict=True)
        )

    def _packed(self, rows: np.ndarray) -> np.ndarray:
        # One byte per code is already packed, which saves a copy of a possibly large table.
        return rows if self.format.bits == 8 else np.asarray(_pack(rows, self.format.bits))

    def _kernel(self, ours: np.ndarray) -> np.ndarray:
        return ours.T if self.is_table else ours

    def _scales(self, ours: np.ndarray) -> np.ndarray:
        kernel = self._kernel(ours).astype(np.float32)
        return kernel[0] if self.format.granularity == "channel" else kernel


def check_coded(name: str, shape: tuple[int, ...], format: Format, activations: Any) -> None:
    """Raise an error that names the tensor ``(out, in)`` unless it can be packed in this format."""
    d_out, d_in = shape
    try:
        check_packable(d_in, format, activations)
        grouped_shape((d_in, d_out), format)
    except ValueError as error:
        raise FolderError(f"{name}: {error}") from error


def check_scales(name: str, scales: np.ndarray, *, positive: bool = True) -> None:
    """Raise an error that names the tensor unless its scales are finite and, if they must be, positive."""
    wrong = scales[~np.isfinite(scales) | ((scales <= 0) & positive)]
    if wrong.size:
        wanted = "finite and positive" if positive else "finite"
        raise FolderError(f"{name} must be {wanted}, got {wrong.flat[0]}")


def kernel_codes(weight: PackedWeight) -> np.ndarray:
    """Return the codes of a packed matrix, ``(in, out)``."""
    return np.asarray(_unpack(weight.data, weight.format.bits)).T


def kernel_scales(weight: PackedWeight, scales: Any) -> np.ndarray:
    """Return its scales or zero points as ``(groups, out)``: one group, unless the format has groups of inputs."""
    scales = np.asarray(scales)
    if weight.format.granularity == "group":
        return scales
    d_out = weight.data.shape[0]
    flat = scales.reshape(-1)  # one for the matrix, for each block of outputs, or for each output
    return np.repeat(flat, d_out // flat.size)[None]
