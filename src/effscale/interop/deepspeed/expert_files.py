"""Checkpoints of DeepSpeed's ``MoE``: one file per expert, and one for the rest of the model."""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.interop.deepspeed.states import ModelStates
from effscale.interop.files.torch import TorchFile
from effscale.interop.tensors import FolderError, TensorInfo

FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
REST = re.compile(r"mp_rank_(\d+)_model_states\.pt")
NAME = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)", re.DOTALL)
"""The parts of an expert tensor's name: the layer, the number of the expert in the layer, and the name in the expert."""

GATE = "deepspeed_moe.gate.wg.weight"
"""A layer's router, with one row per expert."""


def expert_file(layer: int, expert: int) -> str:
    """Return the name of an expert's file; layers with experts are numbered from 0."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def expert_tensor(prefix: str, expert: int, name: str) -> str:
    """Return the name of an expert's tensor."""
    return f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"


class DeepSpeedMoE:
    """All tensors of such a checkpoint, under their names in the whole model; see ``effscale.interop.tensors.Tensors``.

    Experts have their number in the layer, not in a process: the files are the same for every ``ep_size``. The file of the
    rest is optional; if present, its routers define how many experts each layer must have.

    Checkpoints of older versions of DeepSpeed, without layer numbers in the names
    (``expert_G_mp_rank_00_model_states.pt``), are not supported.

    Args:
        folder: The folder with the files, or its parent, whose file ``latest`` names it.

    Attributes:
        experts: The number of experts of each layer with experts, by its name, in the order of the model.
        fields: What the file of the rest records about the model; see ``effscale.interop.deepspeed.states.KEPT``.

    Raises:
        FolderError: A file is missing, damaged or of another kind; the experts of a layer differ; the files belong to several
            tensor-parallel ranks.
        ImportError: torch is not installed.

    References:
        DeepSpeed, ``_save_moe_checkpoint`` and ``load_moe_state_dict`` in ``runtime/engine.py``.
            https://github.com/deepspeedai/DeepSpeed
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = _folder_of_files(pathlib.Path(folder))
        rest = self.folder / "mp_rank_00_model_states.pt"
        self._rest = ModelStates(rest) if rest.exists() else None
        self.fields: Mapping[str, Any] = {} if self._rest is None else self._rest.fields
        self.experts: dict[str, int] = {}
        self._files: dict[str, TorchFile] = {}
        for layer, paths in enumerate(self._layers()):
            self._add_layer(layer, [TorchFile(path) for path in paths])
        if self._rest is not None:
            self._check_gates(self._rest.infos)
            self._files |= dict.fromkeys(self._rest.infos, self._rest)
        self.infos: Mapping[str, TensorInfo] = {
            name: file.infos[name] for name, file in self._files.items()
        }

    @staticmethod
    def is_in(folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder, or the one that its file ``latest`` names, contains such files."""
        return bool(_expert_files(_folder_of_files(pathlib.Path(folder))))

    def read(self, name: str) -> np.ndarray:
        """Read one tensor from the file that contains it."""
        if name not in self._files:
            raise FolderError(f"{str(self.folder)!r}: no tensor {name!r}.")
        return self._files[name].read(name)

    def names_of(self, prefix: str) -> list[str]:
        """Return the names of the tensors of an expert of a layer."""
        first = expert_tensor(prefix, 0, "")
        return [name.removeprefix(first) for name in self._files if name.startswith(first)]

    def _layers(self) -> list[list[pathlib.Path]]:
        """Return the files of each layer, in the order of the experts."""
        found: dict[int, dict[int, pathlib.Path]] = {}
        files = _expert_files(self.folder)
        ranks = {int(match[3]) for match in files} | {
            int(match[1]) for path in self.folder.iterdir() if (match := REST.fullmatch(path.name))
        }
        if not files:
            raise FolderError(
                f"{str(self.folder)!r}: no files layer_L_expert_G_mp_rank_00_model_states.pt, in which DeepSpeed saves experts. "
                "Pass the folder of one checkpoint, such as .../global_step1000."
            )
        if ranks != {0}:
            raise FolderError(
                f"{str(self.folder)!r}: has files of the tensor-parallel ranks {sorted(ranks)}; only checkpoints of one rank are supported"
            )
        for match in files:
            layer, expert = int(match[1]), int(match[2])
            if expert in found.setdefault(layer, {}):
                raise FolderError(
                    f"{str(self.folder)!r}: has expert {expert} of layer {layer} twice"
                )
            found[layer][expert] = self.folder / match[0]
        for layer in range(len(found)):
            if layer not in found:
                raise FolderError(
                    f"{str(self.folder)!r}: lacks the expert files of layer {layer}, but has those of layer {max(found)}"
                )
            for expert in range(len(found[layer])):
                if expert not in found[layer]:
                    raise FolderError(
                        f"{str(self.folder / expert_file(layer, expert))!r}: is missing, but there are files of experts of this layer up to "
                        f"{max(found[layer])}. Copy all of them into one folder."
                    )
        return [[found[layer][e] for e in range(len(found[layer]))] for layer in range(len(found))]

    def _add_layer(self, layer: int, files: list[TorchFile]) -> None:
        prefixes, alike = set(), {}
        for expert, file in enumerate(files):
            infos: dict[str, TensorInfo] = {}
            for full, info in file.infos.items():
                match = NAME.fullmatch(full)
                if match is None or match[2] != str(expert):
                    raise FolderError(
                        f"{str(file.path)!r}: {full!r} is not a tensor of expert {expert}"
                    )
                prefixes.add(match[1])
                infos[match[3]] = info
            # A tensor can claim more numbers than the file has by repeating them.
            claimed = sum(math.prod(i.shape) * i.dtype.itemsize for i in infos.values())
            if claimed > file.path.stat().st_size:
                raise FolderError(f"{str(file.path)!r}: is smaller than its tensors")
            alike = alike or infos
            if infos != alike or not infos:
                raise FolderError(
                    f"the experts of layer {layer} differ: {_listed(alike)} in {str(files[0].path)!r}, but {_listed(infos)} in "
                    f"{str(file.path)!r}"
                )
            self._files |= dict.fromkeys(file.infos, file)
        if len(prefixes) > 1 or prefixes & self.experts.keys():
            raise FolderError(
                f"{str(self.folder)!r}: the files of layer {layer} contain experts of {sorted(prefixes | self.experts.keys())}, but each "
                "layer must have its own name. They belong to different models, or to different stages of a pipeline."
            )
        self.experts[prefixes.pop()] = len(files)

    def _check_gates(self, infos: Mapping[str, TensorInfo]) -> None:
        ending = f".{GATE}"
        gates = {
            f".{name}".removesuffix(ending).removeprefix("."): info.shape
            for name, info in infos.items()
            if f".{name}".endswith(ending)
        }
        for prefix in [*gates, *self.experts]:
            wanted, found = gates.get(prefix), self.experts.get(prefix, 0)
            if wanted is None or len(wanted) != 2 or wanted[0] != found:
                router = "none" if wanted is None else f"one of the shape {list(wanted)}"
                raise FolderError(
                    f"{str(self.folder)!r}: has files of {found} experts of {prefix!r}, and its router is {router}. It needs one file for "
                    "each row of the router. Copy all files of the checkpoint into one folder."
                )


def _expert_files(folder: pathlib.Path) -> list[re.Match[str]]:
    matches = (FILE.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted((match for match in matches if match), key=lambda match: match[0])


def _folder_of_files(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder, or the one in it that DeepSpeed's file ``latest`` names."""
    latest = folder / "latest"
    if _expert_files(folder) or not latest.is_file():
        return folder
    with open(latest, encoding="utf-8", errors="replace") as stream:
        tag = stream.read(256).strip()
    # A name of a folder in this one, not a path to another.
    inside = bool(re.fullmatch(r"[\w.+-]+", tag)) and tag not in (".", "..")
    return folder / tag if inside and (folder / tag).is_dir() else folder


def _listed(infos: Mapping[str, TensorInfo]) -> str:
    each = [f"{name} {info.dtype} {list(info.shape)}" for name, info in infos.items()]
    return ", ".join(each[:8]) + (" ..." if len(each) > 8 else "") if each else "nothing"
