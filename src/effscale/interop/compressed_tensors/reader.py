"""Read folders in the layout of compressed-tensors, which transformers and vLLM load.

A quantized linear module NAME, whose weight is ``(out, in)``, has in the safetensors file:

- ``NAME.weight`` (int8) in the format int-quantized; ``NAME.weight_packed`` (words) and
  ``NAME.weight_shape`` in pack-quantized,
- ``NAME.weight_scale``, ``(out, 1)`` or ``(out, in / group_size)``,
- ``NAME.weight_zero_point`` for asymmetric formats: integers, packed along the outputs in pack-quantized.

A code q represents ``(q - zero_point) * scale``. Everything else is stored as without quantization.

A row of words is one stream of bits: with b bits per code, code i occupies the bits from i b on, starting with the
lowest bits of the first word. The stored value is the code plus $2^{b-1}$, so that it is never negative, and zeros fill
the last word of the row. Codes in memory differ (``effscale.quant.qarrays``). Supported are 2, 4 and 8 bits, which never
cross a byte boundary.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int8, Int32

from effscale.interop.compressed_tensors.config import (
    INT,
    PACKED,
    CompressedConfig,
    Scheme,
)
from effscale.interop.foreign import Fields
from effscale.interop.packed.coded import CodedTensor, check_coded, check_scales
from effscale.interop.tensors import FolderError, StructuredTensor, TensorInfo, Tensors

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
WORD_BYTES = 4
FLOATS = ("float32", "float16", "bfloat16", "float64")


class CompressedTensors:
    """The tensors of a folder, with those of quantized modules as coded tensors; see
    ``effscale.interop.tensors.MixedTensors``.

    Raises:
        FolderError: The config is not supported, or a module lacks a tensor or has one of the wrong shape.
    """

    def __init__(self, given: Fields, files: Tensors):
        self._files = files
        self._schemes: dict[str, Scheme] = {}
        config = CompressedConfig(given)
        infos = dict(files.infos)
        for module in _quantized_modules(files.infos):
            scheme = config.scheme_of(module)
            if scheme is None:
                raise FolderError(
                    f"{module}.weight is quantized, but no group of {given.where} targets {module}"
                )
            shape = self._checked_shape(module, scheme)
            for part in _parts(scheme):
                del infos[f"{module}.{part}"]
            name = f"{module}.weight"
            form = (scheme.weights, scheme.activations)
            infos[name] = TensorInfo(shape, np.dtype(np.float32), form)
            self._schemes[name] = scheme
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> np.ndarray | StructuredTensor:
        """Return one tensor: an array, or a coded tensor."""
        if name not in self._schemes:
            return self._files.read(name)
        scheme, module = self._schemes[name], name.removesuffix(".weight")
        format, (d_out, d_in) = scheme.weights, self.infos[name].shape
        part = lambda part: self._files.read(f"{module}.{part}")
        if scheme.layout == INT:
            codes = part("weight")
            half = 1 << (format.bits - 1)
            if codes.min() < -half or codes.max() >= half:
                raise FolderError(f"{name} has codes that do not fit into {format.bits} bits")
        else:
            codes = from_words(part("weight_packed"), format.bits, d_in)
        groups = d_in // (format.group_size or d_in)
        scale = part("weight_scale").astype(np.float32)
        check_scales(f"{module}.weight_scale", scale)
        scale = np.broadcast_to(scale.reshape(-1, groups), (d_out, groups))
        zero = None
        if not format.symmetric:
            points = part("weight_zero_point")
            if scheme.layout == PACKED:
                points = from_words(np.ascontiguousarray(points.T), format.bits, d_out).T
            zero = -points.reshape(-1, groups).astype(np.float32) * scale
        return CodedTensor(codes, scale, zero, format, scheme.activations)

    def _checked_shape(self, module: str, scheme: Scheme) -> tuple[int, int]:
        """Return the shape of the weight, after checking all its tensors."""
        infos, format = self._files.infos, scheme.weights
        if missing := [part for part in _parts(scheme) if f"{module}.{part}" not in infos]:
            raise FolderError(
                f"{module}.{missing[0]} is missing: in {scheme.layout}, {module} needs {', '.join(_parts(scheme))}"
            )
        of = lambda part: infos[f"{module}.{part}"]

        def check_part(part: str, holds: bool, wanted: str) -> None:
            if not holds:
                found = of(part)
                raise FolderError(
                    f"{module}.{part} must be {wanted}, got {found.dtype} {list(found.shape)}"
                )

        if scheme.layout == INT:
            weight = of("weight")
            check_part(
                "weight", weight.dtype == np.int8 and len(weight.shape) == 2, "int8 (out, in)"
            )
            d_out, d_in = weight.shape
        else:
            declared = of("weight_shape")
            check_part(
                "weight_shape",
                declared.shape == (2,) and declared.dtype.kind in "iu",
                "two whole numbers",
            )
            d_out, d_in = map(int, self._files.read(f"{module}.weight_shape"))
            wanted = (d_out, words_in(d_in, format.bits))
            check_part(
                "weight_packed",
                of("weight_packed").dtype == np.int32 and of("weight_packed").shape == wanted,
                f"int32 {list(wanted)} for {d_out} x {d_in} codes of {format.bits} bits",
            )
        if min(d_out, d_in) < 1:
            raise FolderError(f"{module}.weight must have a positive shape, got {[d_out, d_in]}")
        check_coded(f"{module}.weight", (d_out, d_in), format, scheme.activations)
        groups = d_in // (format.group_size or d_in)
        whole = groups == 1 and format.group_size is None
        shapes = [(d_out, groups), *([(d_out,), (1,), ()] if whole else [])]
        scale = of("weight_scale")
        check_part(
            "weight_scale",
            scale.dtype.name in FLOATS and scale.shape in shapes,
            f"floats {list(shapes[0])}",
        )
        if not format.symmetric:
            packed = scheme.layout == PACKED
            wanted = [(words_in(d_out, format.bits), groups)] if packed else shapes
            points = of("weight_zero_point")
            fits = points.shape in wanted and points.dtype == (np.int32 if packed else np.int8)
            kind = "int32" if packed else "int8"
            check_part("weight_zero_point", fits, f"{kind} {list(wanted[0])}")
        return d_out, d_in


def _quantized_modules(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return the modules that have packed tensors in the file."""
    found: dict[str, None] = {}
    for name, info in infos.items():
        module, _, part = name.rpartition(".")
        if part in PARTS or (part == "weight" and info.dtype.kind in "iu"):
            found[module] = None
    return list(found)


def _parts(scheme: Scheme) -> list[str]:
    """Return the tensors of a module."""
    weight = ["weight"] if scheme.layout == INT else ["weight_packed", "weight_shape"]
    return [*weight, "weight_scale", *([] if scheme.weights.symmetric else ["weight_zero_point"])]


def words_in(codes: int, bits: int) -> int:
    """Return the number of words that a row of codes takes.

    Example:
        >>> words_in(64, 4), words_in(65, 4)
        (8, 9)
    """
    return -(-codes * bits // (8 * WORD_BYTES))


def to_words(codes: Int8[np.ndarray, "rows codes"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Pack rows of signed codes into words.

    Example:
        >>> codes = np.array([[1, 0, -8, 7]], np.int8)
        >>> hex(to_words(codes, 4).item())
        '0xf089'
    """
    rows, count = codes.shape
    per_byte = 8 // bits
    packed = np.zeros((rows, words_in(count, bits) * WORD_BYTES), np.uint8)
    unsigned = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    for place in range(per_byte):
        part = unsigned[:, place::per_byte]
        packed[:, : part.shape[1]] |= part << np.uint8(place * bits)
    return packed.view("<i4")


def from_words(
    words: Int32[np.ndarray, "rows words"], bits: int, count: int
) -> Int8[np.ndarray, "rows codes"]:
    """Unpack the first ``count`` codes of each row.

    Example:
        >>> from_words(np.array([[0xF089]], np.int32), 4, 4).tolist()
        [[1, 0, -8, 7]]
    """
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    unsigned = np.empty((len(words), packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        unsigned[:, place::per_byte] = (packed >> np.uint8(place * bits)) & mask
    return (unsigned[:, :count] - np.uint8(1 << (bits - 1))).view(np.int8)
