"""Which files of a model folder hold its weights, and how its JSON files are read."""

import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from effscale.interop.files.deepspeed_moe import DeepSpeedMoE
from effscale.interop.files.megatron import MegatronBloom
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.torch import TorchFile
from effscale.interop.shards import Shards
from effscale.interop.tensors import FolderError, Tensors

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where the weights of a folder are looked for, in this order, which is that of transformers."""

NOT_WEIGHTS = ("adapter_model", "training_args", "optimizer", "scheduler")
"""What else ends like weights: an adapter is no model, and the others are left from training."""


def open_tensors(folder: str | os.PathLike[str]) -> Tensors:
    """Opens the weights of a model folder, without reading them.

    Taken is the first of ``NAMES`` that is there; else Megatron-DeepSpeed's layer files
    (``effscale.interop.files.megatron``); else DeepSpeed's files of experts
    (``effscale.interop.files.deepspeed_moe``); else the only other ``*.safetensors`` file, or the only
    other ``*.bin`` file.

    Args:
        folder: A folder on this machine.

    Returns:
        The tensors of all files together, under the names that they have there.

    Raises:
        FolderError: There is no such folder, no weights in it or more than one candidate; a
            file is damaged; a shard is missing, or does not hold what the index says.
        ImportError: The weights are in PyTorch's format, and there is no torch.
    """
    folder = checked_folder(folder)
    for name in NAMES:
        # A link to a file that is gone is an error of that file, not a reason to look further.
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
                f"{str(folder)!r} holds shards but no index ({_listed(files)}): a download or a "
                "save did not finish. Get the missing files, the .index.json among them, or save "
                "the model again."
            )
        if len(files) > 1:
            raise FolderError(
                f"{str(folder)!r} holds several files that could be the weights: {_listed(files)}. "
                f"Name the right one {NAMES[0] if ending == '.safetensors' else NAMES[2]!r}."
            )
        if files:
            return _open(folder / files[0])
    raise FolderError(
        f"{str(folder)!r} holds no weights: neither {', '.join(NAMES)} nor another .safetensors or "
        f".bin file nor Megatron-DeepSpeed's layer files nor DeepSpeed's of experts. {_content(folder)}"
    )


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Reads a JSON object, such as ``config.json``, from a model folder.

    Args:
        folder: The folder.
        name: The file's name.

    Raises:
        FolderError: There is no such folder or file, or it is not JSON, or no object.
    """
    folder = checked_folder(folder)
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{str(folder)!r} has no {name}. {_content(folder)}") from None
    except json.JSONDecodeError as error:
        raise FolderError(
            f"{str(path)!r} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
            "Download it again, or mend that line."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{str(path)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise FolderError(
            f"{str(path)!r} holds a JSON {type(content).__name__} where an object "
            '({"key": value, ...}) is needed.'
        )
    return content


def checked_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder as a path, after checking that it is one.

    Raises:
        FolderError: It does not exist, or is a file.
    """
    path = pathlib.Path(folder)
    # Those of os.path, unlike pathlib's, know no name that is too long for the file system.
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise FolderError(f"{str(path)!r} is a file: give the folder that it lies in.")
    raise FolderError(
        f"there is no folder {str(path)!r} here. Nothing is downloaded from a hub: give a folder on "
        "this machine. One from the Hugging Face Hub comes with `hf download NAME --local-dir "
        "FOLDER`, or as a clone with git-lfs."
    )


def _open(path: pathlib.Path) -> Tensors:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _open_indexed(folder: pathlib.Path, index: str) -> Tensors:
    where = str(folder / index)
    weight_map = read_json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FolderError(f"{where!r} has no weight_map from names of tensors to names of files.")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if not _stays_inside(name)]
    if outside:
        raise FolderError(f"{where!r} names files outside its folder, refused: {_listed(outside)}.")
    missing = [name for name in files if not os.path.isfile(folder / name)]
    if missing:
        raise FolderError(
            f"{len(missing)} of the {len(files)} files that {where!r} names are not there: "
            f"{_listed(missing)}. Download them into the same folder."
        )
    return Shards(where, {name: _open(folder / name) for name in files}, weight_map)


def _stays_inside(name: str) -> bool:
    # By its letters only: in the Hub's cache the files are links that point outside.
    parts = pathlib.PureWindowsPath(name).parts
    return (
        bool(parts)
        and "\0" not in name
        and ".." not in parts
        and not (pathlib.PureWindowsPath(name).anchor or pathlib.PurePosixPath(name).is_absolute())
    )


def _content(folder: pathlib.Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"It holds: {_listed(names)}." if names else "It is empty."


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
