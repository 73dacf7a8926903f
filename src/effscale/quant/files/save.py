"""From a model with packed weights to a folder that keeps them packed."""

import os
from typing import Any, Literal, get_args

import tokenizers

from effscale.interop.plan import parameters
from effscale.interop.save import write_model
from effscale.models import LoRA, Transformer
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.files.compressed_store import CompressedStore
from effscale.quant.files.own_layout import OwnStore
from effscale.quant.packed import PackedWeight

Layout = Literal["compressed-tensors", "effscale"]
"""How packed weights lie in a folder."""


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
    """Writes a quantized model as a Hugging Face folder that keeps its weights packed.

    ``compressed-tensors`` is what transformers (with the package compressed-tensors) and vLLM load. Matrices of 8 bits whose inputs
    are quantized are written as int-quantized, all others as pack-quantized. Codes and scales stay as they are; scales per
    tensor or per block are repeated for each output. What is read back stands for the same weights, and inputs are
    quantized with ``spread="centred"``, as that library has it. ``effscale`` holds everything that a packed weight can be, comes back
    the same in every respect, and is read by this library alone (`effscale.quant.files.own_layout`).

    Args:
        model: A model from `quantize_model`.
        folder: Where to; made if it is not there.
        layout: ``compressed-tensors`` or ``effscale``.
        dtype: Type of what is not packed, as for `effscale.interop.save_pretrained`.
        max_shard_size: As there.
        like: As there.
        tokenizer: As there.

    Raises:
        ValueError: The model has no packed weights, a LoRA pair or a fake-quantized weight. Or it has a weight for which
            compressed-tensors has no place (the error names it): binary and float8 ones, tables of embeddings, the Conv1D of
            GPT-2, inputs with a fixed scale, zero points that are no whole numbers of scales or lie outside of the codes.
        FolderError: As for `effscale.interop.save_pretrained`.

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
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}")
    _check_weights(model)
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
    """Raises unless the model has packed weights and plain arrays, and nothing else."""
    weights = {name: variable.get_value() for name, variable in parameters(model).items()}
    for name, weight in weights.items():
        if isinstance(weight, FakeQuantizedWeight):
            raise ValueError(f"{name} is fake-quantized: quantize_model packs it")
        if isinstance(weight, LoRA):
            raise ValueError(
                f"{name} has a LoRA pair: save_adapter writes it, and unmerge_lora gives the packed base"
            )
    if not any(isinstance(weight, PackedWeight) for weight in weights.values()):
        raise ValueError("the model has no packed weights: quantize_model makes them")
