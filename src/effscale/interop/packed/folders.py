"""Load and save folders of models whose weights are packed."""

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import tokenizers
from jax.sharding import Mesh

from effscale.interop.compressed_tensors import config as compressed_config
from effscale.interop.compressed_tensors.reader import CompressedTensors
from effscale.interop.compressed_tensors.store import CompressedStore
from effscale.interop.foreign import Fields, shown
from effscale.interop.gguf.blocks import GGUFBlocks
from effscale.interop.gguf.file import GGUFFile
from effscale.interop.load import load_source
from effscale.interop.packed import own_layout
from effscale.interop.plan import values_of
from effscale.interop.save import write_model
from effscale.interop.source import open_source
from effscale.interop.tensors import FolderError, MixedTensors, Tensors
from effscale.models import LoRA, Transformer
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.packed import PackedWeight

Layout = Literal["compressed-tensors", "effscale"]
"""The layout of packed weights in a folder."""


def load_packed(
    path: str | os.PathLike[str], *, dtype: Any = None, mesh: Mesh | None = None
) -> Transformer:
    """Load a quantized model with its weights packed, without ever making a float copy of them.

    Args:
        path: A folder written by ``save_packed``, or by another tool in the layout of compressed-tensors
            (int-quantized and pack-quantized, integers of 8, 4 or 2 bits). Or a GGUF file of a Llama: blocks of Q8_0,
            Q4_0 and Q4_1 stay packed, and tensors of other types become floats.
        dtype: Dtype of unpacked parameters and of the computation: float32, bfloat16 or float16. None uses that of
            the file.
        mesh: The mesh to place the parameters on, as for ``effscale.interop.load_pretrained``.

    Returns:
        The model. Layers that are stored in different formats are in separate groups.

    Raises:
        FolderError: As for ``effscale.interop.load_pretrained``. Also if nothing in the file is packed, if the
            packing is not supported (the message lists what is), or if a tensor lacks its scale or does not match the
            others.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from effscale.models import llama
        >>> from effscale.interop import save_packed
        >>> from effscale.quant import quantize_model, w8a8
        >>> config = llama(num_layers=2, d_model=32, num_heads=2, d_ff=64, vocab_size=50)
        >>> small = quantize_model(Transformer(config, rngs=nnx.Rngs(0)), w8a8())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_packed(small, folder)
        ...     again = load_packed(folder)
        >>> again.groups[0].blocks[0].attention.query.kernel.get_value().format.describe()
        'int8, symmetric, per channel'

    References:
        vLLM project, "compressed-tensors". https://github.com/vllm-project/compressed-tensors
        ggml authors, "GGUF". https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    source = open_source(path, _unpack)
    return load_source(source, dtype=dtype, mesh=mesh)


def _unpack(fields: Mapping[str, Any], tensors: Tensors) -> MixedTensors:
    if isinstance(tensors, GGUFFile):
        return GGUFBlocks(tensors)
    given = Fields("config.json", fields).block("quantization_config", None)
    if given is None:
        raise FolderError(
            "its config.json has no quantization_config, so nothing is packed. Use effscale.interop.load_pretrained"
        )
    if given.text("layout", "") == own_layout.LAYOUT:
        return own_layout.OwnLayout(tensors)
    method = given.text("quant_method", compressed_config.METHOD)
    if method == compressed_config.METHOD:
        return CompressedTensors(given, tensors)
    raise FolderError(
        f"config.json has a quantization_config of {shown(method)}, which is not supported; {compressed_config.WE_HAVE}; "
        f"and its own layout ({own_layout.LAYOUT})"
    )


def save_packed(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    layout: Layout = "compressed-tensors",
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    like: str | os.PathLike[str] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Write a quantized model as a Hugging Face folder that keeps its weights packed.

    Layout ``compressed-tensors`` is what transformers (with the package compressed-tensors) and vLLM load. Matrices
    of 8 bits with quantized inputs are written as int-quantized, all others as pack-quantized. Codes and scales are
    unchanged; scales per tensor or per block are repeated for each output. A model that is loaded again has the same
    weights, and its inputs are quantized with ``spread="centered"``, the convention of that library.

    Layout ``effscale`` holds everything that a packed weight can contain and is restored exactly. Only this library
    reads it (``effscale.interop.packed.own_layout``).

    Args:
        model: A model from ``quantize_model``.
        folder: The folder to write to; created if it does not exist.
        layout: ``compressed-tensors`` or ``effscale``.
        dtype: Dtype of unpacked parameters: float32, bfloat16 or float16. None: in ``compressed-tensors`` bfloat16, which
            every program that loads such folders computes in; in ``effscale`` as in the model.
        max_shard_size: As for ``effscale.interop.save_pretrained``.
        like: As for ``effscale.interop.save_pretrained``.
        tokenizer: As for ``effscale.interop.save_pretrained``.

    Raises:
        ValueError: The model has no packed weights, or it has a LoRA pair or a fake-quantized weight. Or
            compressed-tensors cannot hold one of its weights (the error names it): binary and float8 weights,
            embedding tables, the Conv1D of GPT-2, routers, experts that are not all alike, symmetric and with
            unquantized inputs, inputs with a fixed scale, and zero points that are not integer
            multiples of the scale or do not fit into the codes.
        FolderError: As for ``effscale.interop.save_pretrained``.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from effscale.models import llama
        >>> from effscale.quant import quantize_model, w4a16
        >>> config = llama(num_layers=2, d_model=32, num_heads=2, d_ff=64, vocab_size=50)
        >>> small = quantize_model(Transformer(config, rngs=nnx.Rngs(0)), w4a16(group_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_packed(small, folder)
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    _check_weights(model)
    if dtype is None and layout == "compressed-tensors":
        dtype = "bfloat16"
    store = CompressedStore(model) if layout == "compressed-tensors" else own_layout.OwnStore(model)
    write_model(
        model,
        folder,
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like,
        tokenizer=tokenizer,
        store=store,
        fields={"quantization_config": store.fields},
        metadata=store.metadata,
    )


def _check_weights(model: Transformer) -> None:
    """Raise unless the model has only packed weights and plain arrays, and at least one packed weight."""
    weights = values_of(model)
    for name, weight in weights.items():
        if isinstance(weight, FakeQuantizedWeight):
            raise ValueError(f"{name} is fake-quantized. Pack it with quantize_model")
        if isinstance(weight, LoRA):
            raise ValueError(
                f"{name} has a LoRA pair. Save the pair with save_adapter, and get the packed base with unmerge_lora"
            )
    if not any(isinstance(weight, PackedWeight) for weight in weights.values()):
        raise ValueError("the model has no packed weights. Pack them with quantize_model")
