"""Files written by ``torch.save``, read only through torch's restricted unpickler."""

import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from effscale.interop.tensors import DTYPES, FolderError, TensorInfo, what_it_is

if TYPE_CHECKING:
    import torch

NESTED = ("module", "state_dict", "model_state_dict", "model")
"""Keys under which checkpoints that contain more than a model store it: those of DeepSpeed, of Lightning, and two common ones."""

RESIDENT_PART = 16
"""After reading this fraction of a file, it is mapped again, because pages of a map that were read count as resident memory."""


class TorchFile:
    """One ``.bin`` or ``.pt`` file; see ``effscale.interop.tensors.Tensors``.

    It is read with ``torch.load(weights_only=True)``: a pickle that refers to anything except tensors and
    plain containers is rejected before any of it is called. Tensors come from a memory map; only
    the format from before PyTorch 1.6 cannot be mapped and is held in memory as a whole.

    Torch does not check the checksums in such an archive, so a flipped bit in the data goes
    undetected. In safetensors files written by effscale, it is detected.

    If a checkpoint contains the model along with other things, under one of the names in ``NESTED``, the
    model is read. Everything in its state dict must be a tensor: anything else
    (a step counter, a packed weight of another library) shows that the file contains more than a
    model's weights, and ignoring it silently could leave out a weight.

    Raises:
        ImportError: torch is not installed.
        FolderError: The file cannot be read, or contains anything except a state dict of tensors.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._mapped: Mapping[str, torch.Tensor] | None = None
        self._touched = 0
        try:
            with open(self.path, "rb") as stream:
                self._is_zip = stream.read(4) == b"PK\x03\x04"
            self._identity = self._status()
        except OSError as error:
            raise self._unsound(what_it_is(path) or str(error)) from error
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), _numpy_dtype(tensor))
            for name, tensor in self._state().items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor: a read-only view of the memory map.

        Raises:
            FolderError: The tensor does not exist, its type or layout is not supported, or the file
                changed since it was opened.
        """
        if name not in self.infos:
            raise FolderError(f"{str(self.path)!r}: no tensor {name!r}.")
        if self._is_zip and self._touched * RESIDENT_PART > self._identity[0]:
            self._mapped = None
        tensor = self._state()[name].detach()
        if self.infos[name].dtype not in DTYPES or tensor.layout != _torch().strided:
            raise FolderError(
                f"{str(self.path)!r}: the tensor {name!r} has the type {tensor.dtype} and the layout "
                f"{tensor.layout}, which are not supported. Save it as a plain tensor of floats."
            )
        self._touched += tensor.nbytes
        if tensor.dtype == _torch().bfloat16:
            array = tensor.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
        array.flags.writeable = False
        return array

    def _state(self) -> "Mapping[str, torch.Tensor]":
        if self._mapped is None:
            if self._status() != self._identity:
                raise FolderError(
                    f"{str(self.path)!r}: changed after it was opened. Open the folder again when "
                    "no process writes to it."
                )
            self._mapped, self._touched = self._load(), 0
        return self._mapped

    def _load(self) -> "Mapping[str, torch.Tensor]":
        return self._checked(_find_state(self._content()))

    def _content(self) -> Any:
        """Return everything in the file."""
        torch = _torch()
        try:
            with warnings.catch_warnings():
                # It warns about pickle protocols other than 2; what it cannot read is an error anyway.
                warnings.simplefilter("ignore")
                return torch.load(
                    self.path, weights_only=True, mmap=self._is_zip, map_location="cpu"
                )
        # On damaged files, torch raises any exception that its own code runs into, such as a KeyError.
        except Exception as error:
            if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise FolderError(
                    f"{str(self.path)!r}: its pickle refers to {refused[1]!r}, which no tensor "
                    "needs. It was rejected, and nothing in the file was run. Ask the author of the "
                    "file for only the state_dict(), preferably as safetensors."
                ) from error
            raise self._unsound(what_it_is(self.path) or _reason(error)) from error

    def _checked(self, state: Any) -> "Mapping[str, torch.Tensor]":
        """Return the state dict, if it is one and contains only tensors."""
        if not isinstance(state, Mapping):
            raise self._unsound(f"it contains a {type(state).__name__}, not a state dict")
        others = [
            f"{name!r} ({type(value).__name__})"
            for name, value in state.items()
            if not (isinstance(name, str) and isinstance(value, _torch().Tensor))
        ]
        if others:
            raise self._unsound(
                f"its state dict contains more than tensors: {', '.join(others[:10])}"
                f"{' ...' if len(others) > 10 else ''}"
            )
        return state

    def _status(self) -> tuple[int, ...]:
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)

    def _unsound(self, reason: str) -> FolderError:
        return FolderError(
            f"{str(self.path)!r}: is not a valid PyTorch file of weights: {reason}. Download or "
            "copy it again, or save the model's state_dict() again, as safetensors if possible."
        )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "reading PyTorch's .bin and .pt files needs torch: install it with pip install torch, or "
            "convert them to safetensors on a machine that has it"
        ) from error
    return torch


def _find_state(content: Any) -> Any:
    while isinstance(content, Mapping) and not any(
        isinstance(value, _torch().Tensor) for value in content.values()
    ):
        inner = next((content[name] for name in NESTED if name in content), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    return content


def _numpy_dtype(tensor: "torch.Tensor") -> np.dtype:
    if tensor.dtype == _torch().bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(name) if name in {dtype.name for dtype in DTYPES} else np.dtype("V")


def _reason(error: Exception) -> str:
    # The rest of this message suggests to disable the protection.
    if str(error).startswith("Weights only load failed"):
        return "its pickle is damaged or contains more than tensors"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".rstrip(". ")
