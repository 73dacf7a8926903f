"""Write tensors to a folder of safetensors files, under the file names of transformers."""

import decimal
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from effscale.atomic import atomic_folder, flush
from effscale.interop.files.safetensors import (
    CHECKSUMS,
    CODES,
    METADATA,
    checksum,
    text_checksum,
)
from effscale.interop.tensors import FolderError
from effscale.paths import local_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FOREIGN = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
WORK = ".effscale-save"


def write_tensors(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_size: int | str = "5GB",
    before_move: Callable[[], object] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Write tensors as ``model.safetensors``, or as shards with an index if they are larger.

    Tensors are taken one by one; at most one shard and the next tensor are in memory. They may be
    read from the same files that they replace. Everything is first written and flushed in a subfolder and
    moved into place when it is complete, so a failure leaves a previous save unchanged. If the
    process is killed while files are moved, the folder contains the previous save, the new one, or
    shards without an index, which no reader uses; never a mixture. Only one process at a time may write to
    a folder.

    Files of a previous save that the new one does not replace are removed at the end: other shards,
    the index, or a single ``model.safetensors`` next to shards. Other weights are never removed.
    ``pytorch_model*.bin`` would remain next to the new files as another model, which readers that prefer
    that format would load, so a folder that contains them is rejected. Other files in the folder are not touched.

    The bytes of a file depend only on the tensors. The metadata of each file contains checksums
    (``effscale.interop.files.safetensors.SafetensorsFile``), which other readers ignore.

    Args:
        folder: The folder to write to; created if it does not exist.
        tensors: Names and arrays, in the order in which shards are filled.
        max_shard_size: Maximum bytes of tensors per file, as a number or a string like ``"500MB"`` (10**6)
            or ``"1GiB"`` (2**30). A larger tensor gets a separate file.
        before_move: Called when everything is written and before anything is moved into place.
        metadata: Texts for the header of every file, with keys that begin with
            ``effscale.interop.files.safetensors.PREFIX``; covered by the checksum.

    Returns:
        The files, the index last.

    Raises:
        FolderError: The folder contains weights in PyTorch's format, or is a file; a name occurs twice
            or is reserved; the format does not support the type of an array; there are no tensors.
        ValueError: ``max_shard_size`` is not a size.
        DiskFullError: The disk is full; the previous contents are unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arrays = [("a", np.zeros(3)), ("b", np.ones((2, 2)))]
        ...     [path.name for path in write_tensors(folder, arrays, max_shard_size=32)][1:]
        ['model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    limit = parse_size(max_shard_size)
    folder = local_path(folder)
    _refuse_foreign(folder)
    work = folder / WORK
    with atomic_folder(work, overwrite=True) as inside:
        shards = []
        for shard in _fill(tensors, limit):
            _write_file(inside / f"{len(shards)}", shard, metadata or {})
            shards.append({name: array.nbytes for name, array in shard.items()})
            del shard  # before the next one is gathered
        if not shards:
            raise FolderError(f"{str(folder)!r}: there are no tensors to write.")
        names = _file_names(len(shards))
        for number, name in enumerate(names):
            (inside / f"{number}").rename(inside / name)
        if len(shards) > 1:
            (inside / INDEX).write_text(_index(names, shards))
            names.append(INDEX)
    if before_move is not None:
        before_move()
    _move_into_place(work, folder, names)
    return [folder / name for name in names]


def parse_size(size: int | str) -> int:
    """Return the number of bytes of a size like ``"5GB"``.

    Raises:
        ValueError: It is not a positive size.

    Example:
        >>> parse_size("1.5MB"), parse_size("2 KiB"), parse_size(10)
        (1500000, 2048, 10)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    unit = UNITS.get(match[2]) if match else None
    count = int(decimal.Decimal(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise ValueError(
            f"max_shard_size must be at least one byte, as a number or with a unit "
            f"like '5GB', '500MB' or '1GiB', got {size!r}."
        )
    return count


def _refuse_foreign(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{str(folder)!r}: is a file; pass a folder to save into.")
    foreign = sorted(
        entry.name for entry in folder.glob("pytorch_model*") if FOREIGN.fullmatch(entry.name)
    )
    if foreign:
        raise FolderError(
            f"{str(folder)!r}: contains weights in PyTorch's format ({', '.join(foreign)}), which would "
            "remain there as another model. Save into another folder, or remove them first."
        )


def _fill(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if name in seen:
            raise FolderError(f"the tensor {name!r} occurs twice.")
        if name == METADATA:
            raise FolderError(f"tensors cannot have the reserved name {METADATA!r}.")
        code = CODE_OF.get(array.dtype.newbyteorder("="))
        if code is None:
            raise FolderError(
                f"the tensor {name!r} has the type {array.dtype}, which is not supported. Convert it to "
                f"one of {', '.join(CODES)}."
            )
        seen.add(name)
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = np.asarray(array, CODES[code], order="C")
        size += array.nbytes
    if shard:
        yield shard


def _write_file(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write one file.

    The safetensors library is not used, because its header has another order in every process, so the
    same tensors would give different bytes.
    """
    # Wide elements first, so that each tensor begins at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {}
    checksums, place = {}, 0
    for name in order:
        array = tensors[name]
        code, start, place = CODE_OF[array.dtype], place, place + array.nbytes
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": (start, place)}
        checksums[name] = checksum(name, code, array.shape, _bytes(array))
    if metadata:
        checksums[METADATA] = text_checksum(metadata)
    metadata = {"format": "pt", **metadata, CHECKSUMS: json.dumps(checksums)}
    text = json.dumps({"__metadata__": metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(_bytes(tensors[name]).data)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(names: list[str], shards: list[dict[str, int]]) -> str:
    total = sum(sum(shard.values()) for shard in shards)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def _move_into_place(work: pathlib.Path, folder: pathlib.Path, names: list[str]) -> None:
    # Readers look for model.safetensors first, then for the index, and use only shards that an index
    # names. So one step switches from the old save to the new: the arrival of model.safetensors or
    # of the index, or the removal of an old model.safetensors next to it. Only if shards
    # of both have the same names must the old index be removed first.
    if len(names) > 1 and any((folder / name).exists() for name in names[:-1]):
        (folder / INDEX).unlink(missing_ok=True)
        flush(folder)
    *first, last = names
    for name in first:
        (work / name).replace(folder / name)
    # A power cut must not keep the index but lose the shards.
    flush(folder)
    (work / last).replace(folder / last)
    flush(folder)
    for entry in folder.iterdir():
        stale = entry.name in (SINGLE, INDEX) or SHARD.fullmatch(entry.name)
        if stale and entry.name not in names:
            entry.unlink()
    work.rmdir()
