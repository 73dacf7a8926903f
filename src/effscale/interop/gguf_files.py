"""Llama models in GGUF files, llama.cpp's format: tensors, dequantized one at a time, and the config."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.interop.gguf_header import Header, import_gguf, read_header
from effscale.interop.tensors import FolderError, TensorInfo

FREQUENCIES = "rope_freqs.weight"
"""What Llama 3.1 divides its rotary frequencies by: part of the config, though the file has it as a tensor."""

REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys that every Llama has, and their names in ``config.json``."""

TOKENS = ("bos_token_id", "eos_token_id", "padding_token_id")


class GGUFFile:
    """The tensors of a GGUF file; see `effscale.interop.tensors.Tensors`.

    Names are the file's (``blk.0.attn_q.weight``) and shapes NumPy's, ``(out, in)`` for a matrix. Every tensor is given in
    float32, whatever it is packed as. The rows of ``attn_q`` and ``attn_k`` are in llama.cpp's order: it rotates
    neighbouring pairs.

    Args:
        path: The file.

    Raises:
        FolderError: The file cannot be read, is not sound, or is one part of a model that was split.
        ImportError: The package gguf is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.header = read_header(path)
        parts = self.header.metadata.get("split.count", 1)
        if parts != 1:
            raise FolderError(
                f"{str(self.header.path)!r} is one of {parts} parts of a model; join them first with "
                "llama.cpp's `llama-gguf-split --merge`."
            )
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(entry.shape, np.dtype(np.float32))
            for name, entry in self.header.entries.items()
            if name != FREQUENCIES
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, read only.

        Raises:
            FolderError: There is no such tensor, the gguf package cannot dequantize its type, or the file changed.
        """
        return _read(self.header, name)


def _read(header: Header, name: str) -> np.ndarray:
    gguf = import_gguf()
    if name not in header.entries:
        raise FolderError(f"{str(header.path)!r} has no tensor {name!r}.")
    entry = header.entries[name]
    data = np.empty(entry.size, np.uint8)
    try:
        with open(header.path, "rb") as stream:
            stream.seek(entry.start)
            count = stream.readinto(data.data)
    except OSError as error:
        raise FolderError(f"{str(header.path)!r}: {name!r} cannot be read ({error}).") from error
    if count != entry.size:
        raise FolderError(f"{str(header.path)!r} was cut short after it was opened.")
    kind = gguf.GGMLQuantizationType(entry.kind)
    try:
        values = gguf.quants.dequantize(data.reshape(entry.byte_shape), kind)
    except NotImplementedError as error:
        raise FolderError(
            f"{str(header.path)!r}: the tensor {name!r} is of type {kind.name}, which the gguf package does not "
            "dequantize; convert the file with llama.cpp's `llama-quantize --allow-requantize ... F16`."
        ) from error
    values.flags.writeable = False
    return values


def gguf_config(file: GGUFFile | str | os.PathLike[str]) -> dict[str, Any]:
    """What ``config.json`` would say of the Llama in a GGUF file.

    Args:
        file: The file, or its path.

    Returns:
        The fields, by transformers' names, ``vocab_size`` and the tokens' ids among them.

    Raises:
        FolderError: The file holds another architecture, lacks a key, or has one that is not understood.
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    return _Config(file.header).fields()


class _Config:
    def __init__(self, header: Header):
        self.header, self.metadata, self.entries = header, header.metadata, header.entries

    def fields(self) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise self.refused(
                f"it holds the architecture {architecture!r}, and of GGUF files only those of llama are read. "
                "For other families, load the Hugging Face folder"
            )
        if self.get("expert_count", 0):
            raise self.refused("it is a mixture of experts (Mixtral), which no family here has")
        if "token_embd.weight" not in self.entries:
            raise self.refused("it lacks token_embd.weight")
        if any(
            isinstance(self.get(key), np.ndarray)
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        ):
            raise self.refused("its layers differ in size, and here all are alike")
        fields = {theirs: self.number(key) for key, theirs in REQUIRED.items()}
        heads = fields["num_attention_heads"]
        head_dim = self.number("attention.key_length", fields["hidden_size"] // heads)
        if self.get("attention.value_length", head_dim) != head_dim:
            raise self.refused("its values' heads are not as wide as its keys'")
        tokens = {f"tokenizer.ggml.{name}": name.replace("padding", "pad") for name in TOKENS}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": self.entries["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self.entries,
            "rope_parameters": self.rope(head_dim, fields["max_position_embeddings"]),
            "dtype": "float32",
            **{ours: self.metadata[key] for key, ours in tokens.items() if key in self.metadata},
        }

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"llama.{key}", default)

    def number(self, key: str, default: float | int | None = None) -> Any:
        """A positive number; of the file's keys, only the epsilon, the base and factors may be no integers."""
        value = self.get(key, default)
        kinds = (int, float) if key.endswith(("epsilon", "base", "factor", "linear")) else int
        if not isinstance(value, kinds) or not 0 < value < math.inf:
            raise self.refused(f"llama.{key} is {value!r}, and should be a positive number")
        return value

    def rope(self, head_dim: int, length: int) -> dict[str, Any]:
        """``rope_parameters``; what stretches the frequencies is in keys, or for Llama 3.1 in a tensor of factors."""
        base = self.number("rope.freq_base", 10000.0)
        rotated = self.number("rope.dimension_count", head_dim)
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        if rotated != head_dim:
            found["partial_rotary_factor"] = rotated / head_dim
        scaling = {
            key.removeprefix("llama.rope.scaling."): value
            for key, value in self.metadata.items()
            if key.startswith("llama.rope.scaling.")
        }
        scaling.pop("finetuned", None)
        # As in llama.cpp, a factor without a type is a linear one, and 0 is none.
        kind = scaling.pop("type", "linear")
        factor = scaling.pop("factor", self.get("rope.scale_linear", 0.0))
        original = scaling.pop("original_context_length", length)
        known = kind in ("none", "linear", "yarn") and isinstance(factor, float | int)
        if not known or scaling:
            raise self.refused(
                f"it scales rotary frequencies in a way not known here: {kind!r} {factor!r} {scaling}"
            )
        if kind != "none" and factor not in (0.0, 1.0):
            found |= {"rope_type": kind, "factor": factor}
            if kind == "yarn":
                found["original_max_position_embeddings"] = original
        if FREQUENCIES in self.entries:
            found |= self.llama3(base, rotated)
        return found

    def llama3(self, base: float | int, rotated: int) -> dict[str, Any]:
        """The parameters that give the tensor's factors: Llama 3.1 and its successors differ in one of them only."""
        given = _read(self.header, FREQUENCIES)
        low, high, original = 1.0, 4.0, 8192
        factor = max(float(given.max()), 1.0)
        turns = original * base ** (-np.arange(0, rotated, 2) / rotated) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        wanted = 1 / ((1 - smooth) / factor + smooth)
        if given.shape != wanted.shape or not np.allclose(given, wanted, rtol=1e-4):
            raise self.refused(f"{FREQUENCIES} is not what Llama 3's rule gives for any factor")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def refused(self, reason: str) -> FolderError:
        return FolderError(f"{str(self.header.path)!r} cannot be loaded: {reason}.")
