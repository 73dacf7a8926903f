"""The interface of a container of tensors: names, shapes, and reading one tensor at a time."""

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
"""The supported types of elements; integers and booleans occur only as buffers."""


class FolderError(ValueError):
    """A model folder, or a file in it, is invalid; the message explains what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read.

    Attributes:
        shape: Its dimensions.
        dtype: The type of its elements; ``read`` rejects types that are not in ``DTYPES``.
        form: None for arrays. For a ``StructuredTensor``, a value that is the same for tensors whose weights can be stacked.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    form: Hashable = None


ToOurs = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""Converts an array in the layout of a file's tensor to effscale's arrays, one for each parameter that it fills."""


@runtime_checkable
class StructuredTensor(Protocol):
    """A tensor that becomes a structured weight (``effscale.models.Weight``) instead of an array, such as integers with scales."""

    def weights(self, to_ours: ToOurs, dtype: np.dtype) -> tuple[Any, ...]:
        """Return the weights, with NumPy arrays, one for each parameter that the tensor fills.

        Args:
            to_ours: The tensor's row of the table, applied to an array.
            dtype: The dtype in which the weights will compute.

        Raises:
            FolderError: The parts of the tensor in the file do not match.
        """
        ...


@runtime_checkable
class Tensors(Protocol):
    """Named tensors in files; a tensor is in memory only while the result of ``read`` is referenced."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The shape and type of every tensor by name, known without reading data."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read the values of one tensor, as a read-only array; release it before the next call, or copy it.

        Raises:
            FolderError: The tensor does not exist, its type is not supported, or the file is damaged.
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
        """Read one tensor, by its new name."""
        if name not in self._old:
            raise FolderError(f"there is no tensor {name!r}.")
        return self._tensors.read(self._old[name])


def what_it_is(path: str | os.PathLike[str]) -> str | None:
    """Describe a file that is often found in place of weights; None if it is none of these."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except FileNotFoundError:
        return "the file does not exist"
    except OSError as error:
        return f"it cannot be opened ({error.strerror})"
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return (
            "it is a git-lfs pointer, not the weights; run `git lfs pull` in the folder's "
            "repository, or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not the weights; download the file itself"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file"
    if start.startswith(b"PK\x03\x04") and pathlib.Path(path).suffix == ".safetensors":
        return "this is a zip archive, perhaps a PyTorch file: name it pytorch_model.bin"
    return None
