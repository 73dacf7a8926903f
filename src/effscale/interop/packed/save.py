"""Save a model with packed weights to a folder that keeps them packed."""

import os
from typing import Any, Literal, get_args

import tokenizers

from effscale.interop.compressed_tensors.store import CompressedStore
from effscale.interop.packed.own_layout import OwnStore
from effscale.interop.plan import parameters
from effscale.interop.save import write_model
from effscale.models import LoRA, Transformer
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.packed import PackedWeight

Layout = Literal["compressed-tensors", "effscale"]
"""The layout of packed weights in a folder."""


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
    store = CompressedStore(model) if layout == "compressed-tensors" else OwnStore(model)
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
    weights = {name: variable.get_value() for name, variable in parameters(model).items()}
    for name, weight in weights.items():
        if isinstance(weight, FakeQuantizedWeight):
            raise ValueError(f"{name} is fake-quantized. Pack it with quantize_model")
        if isinstance(weight, LoRA):
            raise ValueError(
                f"{name} has a LoRA pair. Save the pair with save_adapter, and get the packed base with unmerge_lora"
            )
    if not any(isinstance(weight, PackedWeight) for weight in weights.values()):
        raise ValueError("the model has no packed weights. Pack them with quantize_model")
