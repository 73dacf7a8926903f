"""Find the files with the weights of a model folder, and read its JSON files."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from effscale.interop.deepspeed.expert_files import DeepSpeedMoE
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.torch import TorchFile
from effscale.interop.megatron.bloom import MegatronBloom
from effscale.interop.tensors import FolderError, TensorInfo, Tensors

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""File names of weights, in the order in which they are looked for, which is that of transformers."""

NOT_WEIGHTS = ("adapter_model", "training_args", "optimizer", "scheduler")
"""Other files with the same endings: adapters are not models, and the others are left over from training."""


def open_tensors(folder: str | os.PathLike[str]) -> Tensors:
    """Open the weights of a model folder without reading them.

    The first of these that exists is used: a file in ``NAMES``; Megatron-DeepSpeed's layer files
    (``effscale.interop.megatron.bloom``); DeepSpeed's files of experts
    (``effscale.interop.deepspeed.expert_files``); the only other ``*.safetensors`` file; or the only
    other ``*.bin`` file.

    Returns:
        The tensors of all files together, under their names in the files.

    Raises:
        FolderError: The folder does not exist, or has no weights or more than one candidate; a
            file is damaged; a shard is missing, or does not match the index.
        ImportError: The weights are in PyTorch's format, and torch is not installed.
    """
    folder = checked_folder(folder)
    for name in NAMES:
        # A dangling link is an error of that file, not a reason to look further.
        if os.path.lexists(folder / name):
            return _open_indexed(folder, name) if name.endswith(".json") else _open(folder / name)
    if MegatronBloom.is_in(folder):
        return MegatronBloom(folder)
    if DeepSpeedMoE.is_in(folder):
        return DeepSpeedMoE(folder)
    names = [path.name for path in folder.iterdir() if path.stem not in NOT_WEIGHTS]
    for ending in (".safetensors", ".bin"):
        files = sorted(name for name in names if name.endswith(ending))
        if any(re.search(r"-\d+-of-\d+\.", name) for name in files):
            raise FolderError(
                f"{str(folder)!r}: has shards but no index ({_listed(files)}): a download or a "
                "save was not completed. Get the missing files, including the .index.json, or save "
                "the model again."
            )
        if len(files) > 1:
            raise FolderError(
                f"{str(folder)!r}: has several files that could be the weights: {_listed(files)}. "
                f"Rename the right one to {NAMES[0] if ending == '.safetensors' else NAMES[2]!r}."
            )
        if files:
            return _open(folder / files[0])
    raise FolderError(
        f"{str(folder)!r}: has no weights: no {', '.join(NAMES)}, no other .safetensors or "
        f".bin file, no layer files of Megatron-DeepSpeed and no expert files of DeepSpeed. {_content(folder)}"
    )


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read a JSON object, such as ``config.json``, from a model folder.

    Raises:
        FolderError: The folder or file does not exist, or the file is not a JSON object.
    """
    folder = checked_folder(folder)
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{str(folder)!r}: has no {name}. {_content(folder)}") from None
    except json.JSONDecodeError as error:
        raise FolderError(
            f"{str(path)!r}: is not JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
            "Download it again, or correct that line."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{str(path)!r}: cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise FolderError(
            f"{str(path)!r}: must be a JSON object "
            f'({{"key": value, ...}}), got a {type(content).__name__}.'
        )
    return content


def read_json_if_there(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a model folder; an empty one if the folder has no such file."""
    return read_json(folder, name) if (folder / name).is_file() else {}


def checked_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder as a path, after checking that it is a folder.

    Raises:
        FolderError: It does not exist, or is a file.
    """
    path = pathlib.Path(folder)
    # os.path, unlike pathlib, accepts names that are too long for the file system.
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise FolderError(f"{str(path)!r}: is a file; pass the folder that contains it.")
    raise FolderError(
        f"there is no folder {str(path)!r}. Models are not downloaded automatically: pass a local folder. "
        "To get one from the Hugging Face Hub, run `hf download NAME --local-dir FOLDER`, "
        "or clone it with git-lfs."
    )


class Shards:
    """Several containers as one; see ``effscale.interop.tensors.Tensors``.

    If the files have effscale's metadata, it is the same in all of them.

    A tensor in a file that the index does not name is listed, too; the reader of the model decides
    whether it is unexpected.

    Raises:
        FolderError: A file lacks a tensor that it should contain, or two files contain a tensor that the
            index does not name.
    """

    def __init__(self, where: str, files: Mapping[str, Tensors], weight_map: Mapping[str, str]):
        self._files, self._where = files, where
        self._file_of = dict(weight_map)
        absent = [name for name, file in weight_map.items() if name not in files[file].infos]
        if absent:
            name = absent[0]
            raise FolderError(
                f"{where!r}: does not match its files: {len(absent)} tensors are not "
                f"where it lists them, the first is {name!r} in {weight_map[name]!r}. Download both again."
            )
        for file, tensors in files.items():
            for name in tensors.infos.keys() - weight_map.keys():
                if name in self._file_of:
                    raise FolderError(
                        f"{where!r}: does not name {name!r}, which both {self._file_of[name]!r} and "
                        f"{file!r} contain. Download both again."
                    )
                self._file_of[name] = file
        self.metadata: Mapping[str, str] = self._common_metadata()
        self.infos: Mapping[str, TensorInfo] = {
            name: files[file].infos[name] for name, file in self._file_of.items()
        }

    def _common_metadata(self) -> Mapping[str, str]:
        """Return the metadata that effscale wrote to the header of every file."""
        found = {name: getattr(file, "metadata", {}) for name, file in self._files.items()}
        if not found:
            return {}
        first = next(iter(found))
        for name, metadata in found.items():
            if metadata != found[first]:
                raise FolderError(
                    f"{self._where!r}: {first!r} and {name!r} belong to different saves, by their metadata. Download all of them again."
                )
        return found[first]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor from the file that contains it."""
        if name not in self.infos:
            raise FolderError(f"{self._where!r}: no tensor {name!r} in its files.")
        return self._files[self._file_of[name]].read(name)


def _open(path: pathlib.Path) -> Tensors:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _open_indexed(folder: pathlib.Path, index: str) -> Tensors:
    where = str(folder / index)
    weight_map = read_json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FolderError(f"{where!r}: has no weight_map from names of tensors to names of files.")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if not _stays_inside(name)]
    if outside:
        raise FolderError(
            f"{where!r}: names files outside its folder, which is not allowed: {_listed(outside)}."
        )
    missing = [name for name in files if not os.path.isfile(folder / name)]
    if missing:
        raise FolderError(
            f"{where!r}: {len(missing)} of its {len(files)} files are missing: "
            f"{_listed(missing)}. Download them into the same folder."
        )
    return Shards(where, {name: _open(folder / name) for name in files}, weight_map)


def _stays_inside(name: str) -> bool:
    # Judged only by the name: in the Hub's cache, files are links that point outside.
    parts = pathlib.PureWindowsPath(name).parts
    return (
        bool(parts)
        and "\0" not in name
        and ".." not in parts
        and not (pathlib.PureWindowsPath(name).anchor or pathlib.PurePosixPath(name).is_absolute())
    )


def _content(folder: pathlib.Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"It contains: {_listed(names)}." if names else "It is empty."


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
