"""Llama models in GGUF files, llama.cpp's format: the tensors, dequantized one at a time, and the config."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.interop.foreign import reading, shown
from effscale.interop.gguf.header import import_gguf, read_header
from effscale.interop.tensors import FolderError, TensorInfo

FREQUENCIES = "rope_freqs.weight"
"""Divisors of Llama 3.1's rotary frequencies: part of the config, although the file stores them as a tensor."""

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Keys of the sizes that every Llama has, and their names in ``config.json``."""

TOKENS = ("bos_token_id", "eos_token_id", "padding_token_id")


class GGUFFile:
    """The tensors of a GGUF file; see ``effscale.interop.tensors.Tensors``.

    Names are the file's (``blk.0.attn_q.weight``) and shapes NumPy's, ``(out, in)`` for a matrix. Every tensor is returned in
    float32, whatever its packed format. The rows of ``attn_q`` and ``attn_k`` are in llama.cpp's order, which rotates
    adjacent pairs.

    Raises:
        FolderError: The file cannot be read, is damaged, or is one part of a split model.
        ImportError: The package gguf is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.header = read_header(path)
        parts = self.header.fields.whole("split.count", 1)
        if parts != 1:
            raise FolderError(
                f"{str(self.header.path)!r}: is one of {parts} parts of a model. Join them first with "
                "llama.cpp's `llama-gguf-split --merge`."
            )
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(entry.shape, np.dtype(np.float32))
            for name, entry in self.header.entries.items()
            if name != FREQUENCIES
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in float32, as a read-only array.

        Raises:
            FolderError: The tensor does not exist, the gguf package cannot dequantize its type, or the file changed.
        """
        data, kind = self.read_bytes(name), self._kind(name)
        try:
            values = import_gguf().quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise FolderError(
                f"{str(self.header.path)!r}: the tensor {name!r} has the type {kind.name}, which the gguf package cannot "
                "dequantize. Convert the file with llama.cpp's `llama-quantize --allow-requantize ... F16`."
            ) from error
        values.flags.writeable = False
        return values

    def read_bytes(self, name: str) -> np.ndarray:
        """Read the bytes of one tensor as stored in the file, one row of the tensor per row; see ``read``."""
        path = self.header.path
        if name not in self.header.entries:
            raise FolderError(f"{str(path)!r}: no tensor {name!r}.")
        entry = self.header.entries[name]
        data = np.empty(entry.size, np.uint8)
        try:
            with open(path, "rb") as stream:
                stream.seek(entry.start)
                count = stream.readinto(data.data)
        except OSError as error:
            raise FolderError(f"{str(path)!r}: {name!r} cannot be read ({error}).") from error
        if count != entry.size:
            raise FolderError(f"{str(path)!r}: was truncated after it was opened.")
        return data.reshape(entry.byte_shape)

    def kind(self, name: str) -> str:
        """Return the type of a tensor by ggml's name, such as ``Q4_0``."""
        return self._kind(name).name

    def _kind(self, name: str) -> Any:
        return import_gguf().GGMLQuantizationType(self.header.entries[name].kind)


def gguf_config(file: GGUFFile | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields that ``config.json`` would have for the Llama in a GGUF file.

    Returns:
        The fields under transformers' names, including ``vocab_size`` and the ids of special tokens.

    Raises:
        FolderError: The file has another architecture, lacks a key, or has one that is not supported.
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    with reading(f"{str(file.header.path)!r} cannot be loaded"):
        return _Config(file).fields()


class _Config:
    def __init__(self, file: GGUFFile):
        self.file, self.header = file, file.header
        self.given, self.entries = file.header.fields, file.header.entries

    def fields(self) -> dict[str, Any]:
        architecture = self.given.text("general.architecture")
        if architecture != "llama":
            raise self.refused(
                f"it has the architecture {shown(architecture)}, but only llama is supported in GGUF files. "
                "For other families, load the Hugging Face folder"
            )
        if self.given.whole("llama.expert_count", 0):
            raise self.refused(
                "it is a mixture of experts (Mixtral), which is not supported in GGUF files"
            )
        if "token_embd.weight" not in self.entries:
            raise self.refused("it lacks token_embd.weight")
        if any(
            isinstance(self.header.metadata.get(f"llama.{key}"), np.ndarray)
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        ):
            raise self.refused("its layers differ in size, which is not supported")
        fields = {theirs: self.size(key) for key, theirs in SIZES.items()}
        heads = fields["num_attention_heads"]
        head_dim = self.size("attention.key_length", fields["hidden_size"] // heads)
        if self.size("attention.value_length", head_dim) != head_dim:
            raise self.refused("its value heads and key heads differ in width")
        tokens = {
            name.replace("padding", "pad"): self.given.whole(f"tokenizer.ggml.{name}", None)
            for name in TOKENS
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            "rms_norm_eps": self.positive("attention.layer_norm_rms_epsilon"),
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": self.entries["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self.entries,
            "rope_parameters": self.rope(head_dim, fields["max_position_embeddings"]),
            "dtype": "float32",
            **{name: token for name, token in tokens.items() if token is not None},
        }

    def size(self, key: str, default: Any = ...) -> int:
        """Read a whole number above 0."""
        return self.given.whole(f"llama.{key}", default, least=1)

    def positive(self, key: str, default: Any = ...) -> float:
        """Read a number above 0."""
        value = self.given.number(f"llama.{key}", default)
        if value <= 0:
            raise self.refused(f"llama.{key} must be above 0, got {value!r}")
        return value

    def rope(self, head_dim: int, length: int) -> dict[str, Any]:
        """Return ``rope_parameters``; frequency scaling is stored in keys or, for Llama 3.1, in a tensor of factors."""
        base = self.positive("rope.freq_base", 10000.0)
        rotated = self.size("rope.dimension_count", head_dim)
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        if rotated != head_dim:
            found["partial_rotary_factor"] = rotated / head_dim
        start = "llama.rope.scaling."
        known = [start + key for key in ("finetuned", "type", "factor", "original_context_length")]
        others = [k for k in self.given.values if k.startswith(start) and k not in known]
        # As in llama.cpp, a factor without a type is linear, and 0 means none.
        kind = self.given.text(f"{start}type", "linear")
        factor = self.given.number(
            f"{start}factor", self.given.number("llama.rope.scale_linear", 0.0)
        )
        original = self.size("rope.scaling.original_context_length", length)
        if kind not in ("none", "linear", "yarn") or others:
            raise self.refused(
                f"it scales rotary frequencies in an unsupported way: {shown(kind)} {' '.join(others)}"
            )
        if kind != "none" and factor not in (0.0, 1.0):
            found |= {"rope_type": kind, "factor": factor}
            if kind == "yarn":
                found["original_max_position_embeddings"] = original
        if FREQUENCIES in self.entries:
            found |= self.llama3(base, rotated)
        return found

    def llama3(self, base: float | int, rotated: int) -> dict[str, Any]:
        """Return the parameters that give the tensor's factors: Llama 3.1 and its successors differ in only one of them."""
        given = self.file.read(FREQUENCIES)
        if given.shape != (-(-rotated // 2),):
            # Checked before computing as many factors as a key of the file specifies.
            raise self.refused(f"{FREQUENCIES} has the invalid shape {list(given.shape)}")
        low, high, original = 1.0, 4.0, 8192
        factor = max(float(given.max()), 1.0)
        with np.errstate(all="ignore"):
            turns = original * base ** (-np.arange(0, rotated, 2) / rotated) / (2 * np.pi)
            smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
            wanted = 1 / ((1 - smooth) / factor + smooth)
        if not np.isfinite(factor) or not np.allclose(given, wanted, rtol=1e-4):
            raise self.refused(f"{FREQUENCIES} does not follow Llama 3's rule for any factor")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def refused(self, reason: str) -> FolderError:
        return FolderError(f"{str(self.header.path)!r}: cannot be loaded: {reason}.")
