"""Which files of a model folder hold its weights, and its JSON files."""

import json
import os
import pathlib
from typing import Any

from effscale.interop.safetensors_files import SafetensorsFile
from effscale.interop.tensors import FolderError, Tensors


def open_tensors(folder: str | os.PathLike[str]) -> Tensors:
    """Opens the weights of a model folder (for now: one safetensors file)."""
    return SafetensorsFile(pathlib.Path(folder) / "model.safetensors")


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Reads a JSON object from a folder (for now without checks)."""
    try:
        return json.loads((pathlib.Path(folder) / name).read_bytes())
    except (OSError, ValueError) as error:
        raise FolderError(f"{str(pathlib.Path(folder) / name)!r}: {error}") from error
