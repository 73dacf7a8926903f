"""What a container of tensors is to the rest of the package: names, shapes, and one read at a time."""

import os
import pathlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

DTYPES = frozenset(
    np.dtype(name)
    for name in (
        *("float64", "float32", "float16", ml_dtypes.bfloat16, "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
)
"""The types of elements that are read and written; integers and booleans occur as buffers only."""


class FolderError(ValueError):
    """A model folder, or a file in it, is not what it should be; the message says what would do."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape: Its dimensions.
        dtype: The type of its elements; one that is not in ``DTYPES`` is refused by ``read``.
        form: None for arrays. Of a ``StructuredTensor``, what the weights that are made of it have in common with others that
            can lie in one stack with them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    form: Hashable = None


ToOurs = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""From an array laid out as a tensor of theirs to those of ours, one for each parameter that it fills."""


@runtime_checkable
class StructuredTensor(Protocol):
    """A tensor that becomes a structured weight (``effscale.models.Weight``) rather than an array: codes with scales, for instance."""

    def weights(self, to_ours: ToOurs, dtype: np.dtype) -> tuple[Any, ...]:
        """Our weights, whose arrays are NumPy's, one for each parameter that the tensor fills.

        Args:
            to_ours: Its row of the table, applied to an array.
            dtype: The type in which the weights are to compute.

        Raises:
            FolderError: What the file holds of it does not fit together.
        """
        ...


@runtime_checkable
class Tensors(Protocol):
    """Named tensors in files; a tensor is in memory only while somebody holds what ``read`` gave."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and type, by name, known without reading data."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, read only; drop them before the next call, or make a copy.

        Raises:
            FolderError: There is no such tensor, its type is not taken, or the file is damaged.
        """
        ...


@runtime_checkable
class MixedTensors(Protocol):
    """``Tensors`` of which some may be structured: those whose info has a ``form``."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """As in ``Tensors``."""
        ...

    def read(self, name: str) -> np.ndarray | StructuredTensor:
        """As in ``Tensors``."""
        ...


class Renamed:
    """Tensors under other names.

    Args:
        tensors: The tensors.
        rename: Gives the new name of an old one.

    Raises:
        FolderError: Two tensors would have the same name.
    """

    def __init__(self, tensors: MixedTensors, rename: Callable[[str], str]):
        self._tensors = tensors
        self._old: dict[str, str] = {}
        for name in tensors.infos:
            new = rename(name)
            if new in self._old:
                raise FolderError(f"{self._old[new]!r} and {name!r} would both become {new!r}.")
            self._old[new] = name
        self.infos: Mapping[str, TensorInfo] = {
            new: tensors.infos[name] for new, name in self._old.items()
        }

    def read(self, name: str) -> np.ndarray | StructuredTensor:
        """One tensor, by its new name."""
        if name not in self._old:
            raise FolderError(f"there is no tensor {name!r}.")
        return self._tensors.read(self._old[name])


def what_it_is(path: str | os.PathLike[str]) -> str | None:
    """Says what a file is that often lies where weights should be; None if it is none of these."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"it cannot be opened ({error.strerror})"
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return (
            "this is a git-lfs pointer, not the weights: run `git lfs pull` in the folder's "
            "repository, or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is a web page, not the weights: download the file itself"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file"
    if start.startswith(b"PK\x03\x04") and pathlib.Path(path).suffix == ".safetensors":
        return "this is a zip archive, perhaps a PyTorch file: name it pytorch_model.bin"
    return None
