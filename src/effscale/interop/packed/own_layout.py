"""effscale's own layout, for what other tools have no layout for: ternary and binary matrices, embedding tables,
float8, and fixed input scales.

The folder is the same as without quantization, except for packed weights. Where a tensor NAME of the model family
holds packed weights (several if it holds query, key and value), the safetensors file has instead, for each of them,
numbered i from 0:

- ``NAME.i.data``: int8, the packed codes as stored in memory (see ``effscale.quant.qarrays``), in rows of outputs or
  of a table; float8 values by their bits,
- ``NAME.i.scale``, ``NAME.i.zero``, ``NAME.i.input_scale``, ``NAME.i.input_zero``: float32, as in
  ``effscale.quant.PackedWeight``, if the weight has them,
- ``NAME.i``: the array of a weight that is not packed while others in the tensor are.

Under the key ``effscale.packed``, the header of each file has a JSON object, the same in all files of the folder::

    {"version": 1,
     "weights": {NAME: {"shape": [of the tensor NAME without quantization],
                        "parts": [{"format": {fields of Format}, "activations": {...} or null, "is_table": false}, ...]}}}

where a part that is an array is null. ``config.json`` has the ``quantization_config`` ``{"layout": "effscale"}``. It has
no ``quant_method``, so transformers refuses the folder; a method that it does not know would only make it warn, and load
random weights.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np

from effscale.interop.files.safetensors import PREFIX, SafetensorsFile
from effscale.interop.folder import Shards
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.packed.coded import check_scales
from effscale.interop.plan import parameters, their_shapes
from effscale.interop.save import StoredSlot, ToTheirs, stored_slots
from effscale.interop.table import sizes
from effscale.interop.tensors import FolderError, StructuredTensor, TensorInfo, Tensors, ToOurs
from effscale.models import Transformer
from effscale.quant.formats import Format, stored_bits
from effscale.quant.packed import PackedWeight, check_packable, packed_of_arrays
from effscale.quant.quantizers import scale_shape

LAYOUT = "effscale"
KEY = f"{PREFIX}packed"
VERSION = 1
OPTIONAL = ("zero", "input_scale", "input_zero")
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Part:
    """Everything about a packed weight except its arrays.

    Attributes:
        format: As in ``effscale.quant.PackedWeight``.
        activations: As in ``effscale.quant.PackedWeight``.
        is_table: As in ``effscale.quant.PackedWeight``.
        arrays: Names of the arrays that it has in addition to ``data`` and ``scale``.
    """

    format: Format
    activations: Format | None
    is_table: bool
    arrays: tuple[str, ...]


class OwnStore:
    """Writer of a model's packed weights; see ``effscale.interop.save.Store``.

    Attributes:
        fields: The ``quantization_config``.
        metadata: Metadata for the header of each file.
    """

    def __init__(self, model: Transformer):
        leaves, places = parameters(model), stored_slots(model)
        shapes = their_shapes([place.slot for place in places], leaves, sizes(model.config))
        self._described: dict[str, Any] = {}
        for place in places:
            weights = [leaves[leaf].get_value() for leaf in place.slot.leaves]
            if any(isinstance(weight, PackedWeight) for weight in weights):
                self._described[place.name] = {
                    "shape": list(shapes[place.slot.name]),
                    "parts": [_described(weight) for weight in weights],
                }
        self.fields = {"layout": LAYOUT}
        self.metadata = {KEY: json.dumps({"version": VERSION, "weights": self._described})}

    def __call__(
        self, place: StoredSlot, weights: tuple[Any, ...], to_theirs: ToTheirs
    ) -> Iterator[tuple[str, np.ndarray]] | None:
        """Return the arrays of a packed weight."""
        del to_theirs
        return _arrays(place.name, weights) if place.name in self._described else None


def _described(weight: Any) -> dict[str, Any] | None:
    if not isinstance(weight, PackedWeight):
        return None
    fields = lambda format: None if format is None else dataclasses.asdict(format)
    return {
        "format": fields(weight.format),
        "activations": fields(weight.activations),
        "is_table": weight.is_table,
    }


def _arrays(name: str, weights: tuple[Any, ...]) -> Iterator[tuple[str, np.ndarray]]:
    for i, weight in enumerate(weights):
        if not isinstance(weight, PackedWeight):
            yield f"{name}.{i}", weight
            continue
        yield f"{name}.{i}.data", np.asarray(weight.data).view(np.int8)
        for array in ("scale", *OPTIONAL):
            if getattr(weight, array) is not None:
                yield f"{name}.{i}.{array}", getattr(weight, array)


class OwnLayout:
    """The tensors of a folder in this layout; see ``effscale.interop.tensors.MixedTensors``.

    Raises:
        FolderError: The layout has another version or no version, or an array is missing or has the wrong shape; the
            message names it.
    """

    def __init__(self, files: Tensors):
        self._files = files
        described = _description(files)
        self._parts: dict[str, tuple[Part | None, ...]] = {}
        infos = dict(files.infos)
        for name in described.values:
            with reading(f"{name} cannot be read as packed"):
                shape, parts = self._checked(name, described.block(name))
            for i, part in enumerate(parts):
                for array in _names(name, i, part):
                    del infos[array]
            if name in infos:
                raise FolderError(f"{name} is stored twice, packed and as an array")
            infos[name] = TensorInfo(shape, np.dtype(np.float32), parts)
            self._parts[name] = parts
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> np.ndarray | StructuredTensor:
        """Return one tensor: an array, or the parts of a packed one."""
        if name not in self._parts:
            return self._files.read(name)
        parts = self._parts[name]
        arrays = [
            [self._files.read(array) for array in _names(name, i, part)]
            for i, part in enumerate(parts)
        ]
        for i, part in enumerate(parts):
            if part is not None:
                for array, found in zip(_names(name, i, part)[1:], arrays[i][1:], strict=True):
                    # Scales are zero for ternary zeros, and negative in the blocks of GGUF.
                    check_scales(array, found, positive=array.endswith("input_scale"))
        return OwnTensor(parts, arrays)

    def _checked(self, name: str, given: Fields) -> tuple[tuple[int, ...], tuple[Part | None, ...]]:
        """Return the shape and parts of a tensor, after checking that all arrays are present and match."""
        shape, parts = given.values.get("shape"), given.values.get("parts")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise FolderError(
                f"{name}: its shape in {KEY} must be a list of sizes, got {shown(shape)}"
            )
        if not isinstance(parts, list) or not parts:
            raise FolderError(f"{name}: its parts in {KEY} must be a list, got {shown(parts)}")
        found = []
        for i, described in enumerate(parts):
            part = None
            if described is not None:
                fields = Fields(f"{KEY}, in part {i} of {name},", described)
                optional = [a for a in OPTIONAL if f"{name}.{i}.{a}" in self._files.infos]
                part = Part(
                    cast("Format", _format(fields.block("format"))),
                    _format(fields.block("activations", None)),
                    fields.flag("is_table"),
                    tuple(optional),
                )
            for array in _names(name, i, part):
                if array not in self._files.infos:
                    raise FolderError(f"{array} is missing")
            if part is not None:
                self._check_arrays(f"{name}.{i}", part)
            found.append(part)
        return tuple(shape), tuple(found)

    def _check_arrays(self, name: str, part: Part) -> None:
        infos, format = self._files.infos, part.format
        data = infos[f"{name}.data"]
        if data.dtype != np.int8 or len(data.shape) != 2 or 0 in data.shape:
            raise FolderError(
                f"{name}.data must be rows of int8, got {data.dtype} {list(data.shape)}"
            )
        rows, size = data.shape
        d_in = size * 8 // stored_bits(format.bits)
        check_packable(d_in, format, part.activations)
        groups = scale_shape((d_in, rows), format)
        for array in ("scale", *part.arrays):
            wanted = () if array.startswith("input") else groups
            info = infos[f"{name}.{array}"]
            if info.shape != wanted or info.dtype != np.float32:
                raise FolderError(
                    f"{name}.{array} must be float32 {list(wanted)} for {rows} x {d_in} codes, {format.describe()}, "
                    f"got {info.dtype} {list(info.shape)}"
                )
        for array, needed in (
            ("zero", not format.symmetric),
            ("input_zero", "input_scale" in part.arrays and not _is_symmetric(part.activations)),
        ):
            if needed != (array in part.arrays):
                raise FolderError(
                    f"{name}.{array} is {'missing' if needed else 'not allowed in this format'}"
                )


def _is_symmetric(format: Format | None) -> bool:
    return format is None or format.symmetric


@dataclasses.dataclass(frozen=True)
class OwnTensor:
    """The parts of a tensor with their arrays; see ``effscale.interop.tensors.StructuredTensor``."""

    parts: tuple[Part | None, ...]
    arrays: list[list[np.ndarray]]

    def weights(self, to_ours: ToOurs, dtype: np.dtype) -> tuple[Any, ...]:
        """Return the weights; their arrays are stored as they are used in memory."""
        del to_ours
        return tuple(
            arrays[0].astype(dtype) if part is None else _weight(part, arrays, dtype)
            for part, arrays in zip(self.parts, self.arrays, strict=True)
        )


def _weight(part: Part, arrays: list[np.ndarray], dtype: np.dtype) -> PackedWeight:
    data, scale, *optional = arrays
    found = dict.fromkeys(OPTIONAL) | dict(zip(part.arrays, optional, strict=True))
    return packed_of_arrays(
        data.view(FLOAT8) if part.format.floating else data,
        scale,
        **found,
        format=part.format,
        activations=part.activations,
        is_table=part.is_table,
        dtype=dtype,
    )


def _names(name: str, i: int, part: Part | None) -> list[str]:
    """Return the names of a part's arrays."""
    if part is None:
        return [f"{name}.{i}"]
    return [f"{name}.{i}.{array}" for array in ("data", "scale", *part.arrays)]


def _format(given: Fields | None) -> Format | None:
    return None if given is None else Format(**given.values)


def _description(files: Tensors) -> Fields:
    """Return the description of each tensor in the header, by name."""
    text = files.metadata.get(KEY) if isinstance(files, SafetensorsFile | Shards) else None
    if text is None:
        raise FolderError(
            f"according to config.json the weights are packed in effscale's layout, but the files have no {KEY!r} in their header: "
            "another program rewrote them"
        )
    with reading(f"{KEY} in the header cannot be read"):
        given = Fields(KEY, json.loads(text))
        version = given.whole("version")
        if version != VERSION:
            raise FolderError(
                f"the weights are packed in version {version} of effscale's layout, and this effscale reads version {VERSION}. "
                "Use the effscale that wrote them, or a newer one"
            )
        return given.block("weights")
