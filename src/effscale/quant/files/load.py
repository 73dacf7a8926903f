"""From files of packed weights to a model that computes with them as they are."""

import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from effscale.interop.files.gguf import GGUFFile
from effscale.interop.foreign import Fields, shown
from effscale.interop.load import load_source
from effscale.interop.source import open_source
from effscale.interop.tensors import FolderError, MixedTensors, Tensors
from effscale.models import Transformer
from effscale.quant.files import compressed_config, own_layout
from effscale.quant.files.compressed_tensors import CompressedTensors
from effscale.quant.files.gguf_blocks import GGUFBlocks


def load_packed(
    path: str | os.PathLike[str], *, dtype: Any = None, mesh: Mesh | None = None
) -> Transformer:
    """Loads a quantized model into packed weights; no float copy of them is ever made.

    Args:
        path: A folder that `save_packed` wrote, or another tool in the layout of compressed-tensors (int-quantized and
            pack-quantized, integers of 8, 4 or 2 bits); or a GGUF file of a Llama, of which the blocks of Q8_0, Q4_0 and
            Q4_1 stay packed, and tensors of other types are floats.
        dtype: Type of what is not packed, and of what the model computes in: float32, bfloat16 or float16. None: that of
            the file.
        mesh: Where the parameters lie, as for `effscale.interop.load_pretrained`.

    Returns:
        The model. Layers that are stored in different formats are in groups of their own.

    Raises:
        FolderError: As for `effscale.interop.load_pretrained`; or nothing in the file is packed, or it is packed in a way that
            is not read (the message says which are); or a tensor lacks its scale or does not fit the others.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from effscale.models import llama
        >>> from effscale.quant import quantize_model, save_packed, w8a8
        >>> config = llama(num_layers=2, d_model=32, num_heads=2, d_ff=64, vocab_size=50)
        >>> small = quantize_model(Transformer(config, rngs=nnx.Rngs(0)), w8a8())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_packed(small, folder)
        ...     again = load_packed(folder)
        >>> again.groups[0].blocks[0].attention.query.kernel.get_value().format.describe()
        'int8, symmetric, per channel'

    References:
        `compressed-tensors <https://github.com/vllm-project/compressed-tensors>`_, `GGUF
        <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_
    """
    source = open_source(path, _unpack)
    return load_source(source, dtype=dtype, mesh=mesh)


def _unpack(fields: Mapping[str, Any], tensors: Tensors) -> MixedTensors:
    if isinstance(tensors, GGUFFile):
        return GGUFBlocks(tensors)
    given = Fields("config.json", fields).block("quantization_config", None)
    if given is None:
        raise FolderError(
            "its config.json has no quantization_config: nothing is packed. effscale.interop.load_pretrained loads it"
        )
    method = given.text("quant_method", compressed_config.METHOD)
    if method == compressed_config.METHOD:
        return CompressedTensors(given, tensors)
    if method == own_layout.METHOD:
        return own_layout.OwnLayout(tensors)
    raise FolderError(
        f"config.json has a quantization_config of {shown(method)}, which is not read; {compressed_config.WE_HAVE}; "
        f"and the layout of its own ({own_layout.METHOD})"
    )
