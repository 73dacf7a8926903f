"""A model on disk: its family, its config, and its tensors under the table's names."""

import dataclasses
import hashlib
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effscale.interop.families import FAMILIES
from effscale.interop.families.family import Family, named_class
from effscale.interop.families.llama import GGUF_TABLE, LLAMA
from effscale.interop.folder import open_tensors, read_json
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.gguf.file import GGUFFile, gguf_config
from effscale.interop.table import Rule
from effscale.interop.tensors import (
    FolderError,
    MixedTensors,
    Renamed,
    StructuredTensor,
    TensorInfo,
    Tensors,
)
from effscale.models import LMHead, TransformerConfig
from effscale.moe import MoEConfig

LAYERS = ("num_hidden_layers", "n_layer")
"""Names of the number of layers in ``config.json``."""

# The endings of a family's class names: other families may have the same prefix, such as GPTNeoXJapanese.
CLASSES = r"(For[A-Z]\w*|Model|LMHeadModel|DoubleHeadsModel)"


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything needed to load a model, with nothing loaded yet.

    Attributes:
        path: The folder or file.
        family: Its family.
        fields: The fields of ``config.json``.
        config: The model's config, without a choice of dtypes.
        rules: The table of its tensors.
        tensors: Its tensors, by the names of the table.
        names: The tensors that make up the model; the others repeat these, are ignored, or belong to heads that are not
            requested.
        fresh: Paths of parameters that have no tensor and are initialized.
    """

    path: pathlib.Path
    family: Family
    fields: Mapping[str, Any]
    config: TransformerConfig
    rules: tuple[Rule, ...]
    tensors: MixedTensors
    names: frozenset[str]
    fresh: frozenset[str] = frozenset()


Unpack = Callable[[Mapping[str, Any], Tensors], MixedTensors]
"""Converts the tensors in files to tensors of which some are structured, given the fields of ``config.json``."""


def open_source(path: str | os.PathLike[str], unpack: Unpack | None = None) -> Source:
    """Open a model folder (or a GGUF file) and identify its contents.

    Args:
        path: The folder or file.
        unpack: Converts packed tensors to structured tensors. Without it, packed tensors of a GGUF file are read as
            floats, and folders with a ``quantization_config`` are rejected.

    Raises:
        FolderError: It is not a model of a supported family, or is damaged.
    """
    place = pathlib.Path(path)
    with reading(f"{shown(str(place))} cannot be loaded"):
        gguf = gguf_path(place)
        return _open_folder(place, unpack) if gguf is None else _open_gguf(gguf, unpack)


def _open_gguf(path: pathlib.Path, unpack: Unpack | None) -> Source:
    file = GGUFFile(path)
    fields = gguf_config(file)
    check_layers(str(path), fields, len(file.infos))
    config = LLAMA.config(fields, {})
    tensors = file if unpack is None else unpack(fields, file)
    return Source(path, LLAMA, fields, config, GGUF_TABLE, tensors, frozenset(tensors.infos))


def _open_folder(place: pathlib.Path, unpack: Unpack | None) -> Source:
    fields = read_config(place)
    if unpack is None:
        refuse_packed(place, fields)
        files = open_tensors(place)
    else:
        files = unpack(fields, open_tensors(place))
    family = identify(fields, files.infos)
    tensors = family.split(Renamed(files, family.canonical))
    infos = {
        name: info
        for name, info in tensors.infos.items()
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    }
    fields = dict(fields) | {"add_pooling_layer": "pooler.dense.weight" in infos}
    check_layers("config.json", {**family.defaults, **fields}, len(infos))
    config = family.config(fields, infos)
    check_experts(config, len(infos))
    tensors, infos, config = _resolve_repeats(family, tensors, infos, config)
    rules = family.trunk + family.heads
    return Source(place, family, fields, config, rules, tensors, frozenset(infos))


def check_layers(where: str, fields: Mapping[str, Any], tensors: int) -> None:
    """Reject more layers than there are tensors, before anything of that number is created.

    Other sizes need no such bound: before they are compared with the tensors, only shapes are computed.
    """
    for name in LAYERS:
        if Fields(where, fields).whole(name, 0) > tensors:
            raise FolderError(
                f"{where}: {name} must be at most the number of tensors, {tensors}, got {shown(fields[name])}"
            )


def check_experts(config: TransformerConfig, tensors: int) -> None:
    """Reject more experts than there are tensors, as ``check_layers`` does for layers."""
    parts = [layer.feed_forward for layer in config.layers]
    counts = [part.num_experts for part in parts if isinstance(part, MoEConfig)]
    if sum(counts) > tensors:
        raise FolderError(
            f"config.json: {max(counts)} experts in each of {len(counts)} layers are more than the {tensors} tensors"
        )


def read_config(place: pathlib.Path) -> dict[str, Any]:
    """Return the fields of ``config.json``.

    Raises:
        FolderError: The file does not exist.
    """
    if os.path.isdir(place) and not (place / "config.json").is_file():
        files = sorted(path.name for path in place.glob("*.gguf"))
        if files:
            raise FolderError(
                f"{str(place)!r}: contains several GGUF files. Pass one of them, such as {files[0]!r}, instead of the folder"
            )
        if (place / "adapter_config.json").is_file():
            raise FolderError(
                f"{str(place)!r}: contains an adapter. Load its base model, and pass both to load_adapter"
            )
    return read_json(place, "config.json")


def refuse_packed(place: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Raise if ``config.json`` describes quantized weights."""
    packed = fields.get("quantization_config")
    if packed:
        method = packed
        if isinstance(packed, dict):
            method = packed.get("quant_method", packed.get("layout"))
        raise FolderError(
            f"{str(place)!r}: the weights are quantized ({shown(method)}). Load those of compressed-tensors or effscale with "
            "effscale.interop.load_packed; load others in transformers, call dequantize() and save them"
        )


def gguf_path(path: pathlib.Path) -> pathlib.Path | None:
    """Return the GGUF file that a path names, or the only one in a folder without ``config.json``; otherwise None."""
    if path.suffix == ".gguf":
        return path
    if not os.path.isdir(path) or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def named_family(fields: Mapping[str, Any]) -> Family | None:
    """Return the family that a config names, by its ``model_type`` or, in old configs, by a class; None if it names none."""
    named, architecture = fields.get("model_type"), named_class(fields)
    if named is not None:
        return FAMILIES.get(named) if isinstance(named, str) else None
    every = FAMILIES.values()
    return next((f for f in every if re.fullmatch(f"{f.class_name}{CLASSES}", architecture)), None)


def identify(fields: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Family:
    """Return the family of a folder: by its config or, if an old config does not name it, by its tensors."""
    named, architecture = fields.get("model_type"), named_class(fields)
    if (family := named_family(fields)) is not None:
        return family
    if named is not None or architecture:
        raise FolderError(
            f"config.json: the architecture must belong to one of {', '.join(FAMILIES)}, got "
            f"{shown(architecture or named)} (model_type {shown(named)})"
        )

    def known(family: Family) -> int:
        patterns = {re.escape(r.theirs).replace(r"\{\}", r"\d+") for r in family.trunk}
        whole = re.compile("|".join(patterns))
        return sum(whole.fullmatch(family.canonical(name)) is not None for name in infos)

    best = max(FAMILIES.values(), key=known)
    if known(best) * 2 < len(infos):
        raise FolderError(
            "config.json: has neither model_type nor architectures, and the names of the tensors match none of "
            f"the supported families: {', '.join(FAMILIES)}"
        )
    return best


def _resolve_repeats(
    family: Family, tensors: MixedTensors, infos: dict[str, TensorInfo], config: TransformerConfig
) -> tuple[MixedTensors, dict[str, TensorInfo], TransformerConfig]:
    """Drop tensors that repeat another; one that should but does not becomes a separate weight."""
    untied = [head for head in config.heads if isinstance(head, LMHead) and not head.tied]
    for repeat, original in family.tied.items():
        own = bool(untied) and repeat.endswith(".weight")
        if repeat not in infos or own:
            continue
        if original not in infos:
            # The file has the tensor only under its second name.
            renamed = {repeat: original}
            tensors = Renamed(tensors, lambda name, r=renamed: r.get(name, name))
            infos[original] = infos.pop(repeat)
        elif _same(tensors, repeat, original):
            del infos[repeat]
        elif repeat.endswith(".bias"):
            warnings.warn(
                f"{repeat} and {original} should be the same, but their values differ. The former is loaded, because "
                "transformers computes with it",
                stacklevel=5,
            )
            exchanged = {repeat: original, original: repeat}
            tensors = Renamed(tensors, lambda name, e=exchanged: e.get(name, name))
            infos[original] = infos.pop(repeat)
        else:
            warnings.warn(
                f"config.json ties {repeat} to {original}, but their values differ: both are loaded",
                stacklevel=5,
            )
            heads = tuple(
                dataclasses.replace(head, tied=False) if isinstance(head, LMHead) else head
                for head in config.heads
            )
            config = dataclasses.replace(config, heads=heads)
    return tensors, infos, config


def _same(tensors: MixedTensors, one: str, other: str) -> bool:
    """Return whether two tensors contain the same numbers; structured ones are not compared."""
    digests = [_digest(tensors.read(name)) for name in (one, other)]
    return digests[0] == digests[1] and digests[0] is not None


def _digest(tensor: np.ndarray | StructuredTensor) -> tuple[Any, ...] | None:
    if isinstance(tensor, StructuredTensor):
        return None
    data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return tensor.shape, tensor.dtype, hashlib.blake2b(data.data).digest()
