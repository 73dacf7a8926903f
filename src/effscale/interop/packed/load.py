"""Load files of packed weights into a model that computes with them directly."""

import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from effscale.interop.compressed_tensors import config as compressed_config
from effscale.interop.compressed_tensors.reader import CompressedTensors
from effscale.interop.foreign import Fields, shown
from effscale.interop.gguf.blocks import GGUFBlocks
from effscale.interop.gguf.file import GGUFFile
from effscale.interop.load import load_source
from effscale.interop.packed import own_layout
from effscale.interop.source import open_source
from effscale.interop.tensors import FolderError, MixedTensors, Tensors
from effscale.models import Transformer


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
