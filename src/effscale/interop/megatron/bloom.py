"""BLOOM checkpoints of Megatron-DeepSpeed: one file per layer and tensor-parallel rank."""

import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from effscale.interop.files.torch import TorchFile
from effscale.interop.tensors import FolderError, TensorInfo

FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")

FIRST_BLOCK = 3
"""Layer 1 is the embedding, layers 0 and 2 have no weights, and the blocks follow."""

BLOCK = tuple(
    f"{module}.{kind}"
    for module in (
        "input_layernorm",
        "self_attention.query_key_value",
        "self_attention.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    for kind in ("weight", "bias")
)
OUTSIDE = {
    "word_embeddings.weight": "word_embeddings.weight",
    "word_embeddings.norm.weight": "word_embeddings_layernorm.weight",
    "word_embeddings.norm.bias": "word_embeddings_layernorm.bias",
    "weight": "ln_f.weight",
    "bias": "ln_f.bias",
}
"""Names outside of the blocks, in Megatron and in Hugging Face."""

# How the ranks' parts are merged. A layer that splits its outputs (the fused query, key and
# value, by head; the first MLP kernel; the embedding, by words) is concatenated along rows. One
# that splits its inputs is concatenated along columns. Parameters that every rank has whole are averaged.
COLUMNS = re.compile(r"(self_attention\.dense|mlp\.dense_4h_to_h)\.weight$")
WHOLE = re.compile(r"(layernorm\.\w+|ln_f\.\w+|(self_attention\.dense|mlp\.dense_4h_to_h)\.bias)$")


class MegatronBloom:
    """A Megatron-DeepSpeed folder under Hugging Face's names; see ``effscale.interop.tensors.Tensors``.

    Files are named ``layer_XX-model_YY-model_states.pt`` with the layer XX and the rank YY. A tensor
    is assembled when it is read, from mapped files. Parameters that every rank has whole (layer norms,
    and the biases that are added after the sum over ranks) may have drifted apart in training and
    are averaged; if all ranks have the same bytes, these are the result.

    Names lack the prefix ``transformer.``, as in BLOOM's own files on the Hub.

    Raises:
        FolderError: A rank or a layer is missing; ranks have different names, shapes or types; a
            name does not belong to BLOOM.
        ImportError: torch is not installed.

    References:
        Le Scao et al., "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model" (2022).
            https://arxiv.org/abs/2211.05100
        The names and rules are those of ``convert_bloom_original_checkpoint_to_pytorch`` in transformers 4.31.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self._parts: dict[str, tuple[str, list[TorchFile]]] = {}
        infos: dict[str, TensorInfo] = {}
        blocks = set()
        for layer, paths in self._layers().items():
            ranks = [TorchFile(path) for path in paths]
            for old in dict.fromkeys(old for rank in ranks for old in rank.infos):
                name = _new_name(layer, old)
                if name is None:
                    raise FolderError(f"{str(paths[0])!r}: {old!r} is not a tensor of BLOOM.")
                if name in infos:
                    raise FolderError(f"{str(self.folder)!r}: has {name!r} in two layers.")
                if old in BLOCK:
                    blocks.add(layer)
                infos[name] = _merged_info(name, old, ranks)
                self._parts[name] = (old, ranks)
        missing = sorted(set(range(FIRST_BLOCK, max(blocks, default=FIRST_BLOCK) + 1)) - blocks)
        if missing:
            raise FolderError(
                f"{str(self.folder)!r}: lacks the files of layers {missing}, blocks "
                f"{[layer - FIRST_BLOCK for layer in missing]} of the model. Copy them to this folder, too."
            )
        self.infos: Mapping[str, TensorInfo] = infos

    @staticmethod
    def is_in(folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder contains such layer files."""
        return any(FILE.fullmatch(entry.name) for entry in pathlib.Path(folder).iterdir())

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, merged over the ranks."""
        if name not in self.infos:
            raise FolderError(f"{str(self.folder)!r}: no tensor {name!r}.")
        old, ranks = self._parts[name]
        parts = [rank.read(old) for rank in ranks]
        if not WHOLE.search(name):
            return np.concatenate(parts, axis=1 if COLUMNS.search(name) else 0)
        if all(part.tobytes() == parts[0].tobytes() for part in parts):
            return parts[0]
        return np.mean(parts, axis=0, dtype=np.float64).astype(parts[0].dtype)

    def _layers(self) -> dict[int, list[pathlib.Path]]:
        found: dict[int, dict[int, pathlib.Path]] = {}
        for path in sorted(self.folder.iterdir()):
            if match := FILE.fullmatch(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        count = 1 + max((rank for ranks in found.values() for rank in ranks), default=0)
        missing = [
            f"rank {rank} of layer {layer}"
            for layer, ranks in sorted(found.items())
            for rank in range(count)
            if rank not in ranks
        ]
        if missing or not found:
            raise FolderError(
                f"{str(self.folder)!r}: lacks layer files of Megatron-DeepSpeed: "
                f"{', '.join(missing[:20]) or 'none was found'}. Copy all of them into one folder."
            )
        return {
            layer: [ranks[rank] for rank in range(count)] for layer, ranks in sorted(found.items())
        }


def _new_name(layer: int, old: str) -> str | None:
    if old in BLOCK and layer >= FIRST_BLOCK:
        return f"h.{layer - FIRST_BLOCK}.{old}"
    return OUTSIDE.get(old)


def _merged_info(name: str, old: str, ranks: list[TorchFile]) -> TensorInfo:
    for rank in ranks:
        if old not in rank.infos:
            raise FolderError(f"{str(rank.path)!r}: lacks {old!r}, which other ranks have.")
    first = ranks[0].infos[old]
    for rank in ranks:
        if rank.infos[old] != first:
            raise FolderError(
                f"ranks disagree: {old!r} is {_described(first)} in {str(ranks[0].path)!r} and "
                f"{_described(rank.infos[old])} in {str(rank.path)!r}."
            )
    shape = list(first.shape)
    if not WHOLE.search(name):
        axis = 1 if COLUMNS.search(name) else 0
        if axis >= len(shape):
            raise FolderError(
                f"{str(ranks[0].path)!r}: {old!r} has the invalid shape {first.shape}."
            )
        shape[axis] *= len(ranks)
    return TensorInfo(tuple(shape), first.dtype)


def _described(info: TensorInfo) -> str:
    return f"{info.dtype} {info.shape}"
