"""Quantization of the same model by other libraries, for the experiment ``zeroquant``: torchao and qwix."""

import dataclasses
import importlib
import importlib.util
import pathlib
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effscale.models import Transformer, map_weights
from effscale.models.activations import Activation
from effscale.models.weights import finish

TORCH = ("torch_float32", "torchao_w8a8")
"""The model in transformers, unquantized and with torchao's ``Int8DynamicActivationInt8WeightConfig``."""

QWIX = ("qwix_w8a8", "qwix_w4")
"""qwix's codes and products in this library's model: 8 bits per output and per token; 4 bits in tiles with unquantized inputs."""


def require() -> None:
    """Raise an ImportError that says what to install unless all peers are installed."""
    needed = ("torch", "transformers", "accelerate", "torchao", "qwix")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--peers needs {', '.join(missing)}: install them with pip install {' '.join(missing)}, or leave out --peers"
        )


def by_qwix(model: Transformer, name: str, tile: int) -> Transformer:
    """Return the model with its layers' kernels quantized and multiplied by qwix.

    Args:
        model: The float model.
        name: A name in ``QWIX``.
        tile: Number of inputs that share a scale in 4 bits.
    """
    import qwix

    def convert(kernel: Array) -> "_QwixWeight":
        *stack, _, _ = kernel.shape
        axes = (*range(len(stack)), kernel.ndim - 1)
        if name == "qwix_w8a8":
            return _QwixWeight(qwix.quantize(kernel, "int8", channelwise_axes=axes), True)
        tiles = {kernel.ndim - 2: tile}
        return _QwixWeight(
            qwix.quantize(kernel, "int4", channelwise_axes=axes, tiled_axes=tiles), False
        )

    return map_weights(model, convert, r"groups\..*kernel")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes and placeholders, too
class _QwixWeight:
    """A kernel of qwix, with qwix's product."""

    array: Any
    has_quantized_inputs: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        return self.array.qvalue.shape

    @property
    def dtype(self) -> Any:
        """Dtype of results."""
        return jnp.dtype("float32")

    def astype(self, dtype: Any) -> "_QwixWeight":
        """Return itself; only float32 is needed here."""
        del dtype
        return self

    def matmul(
        self, x: Array, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """``qwix.dot``."""
        import qwix

        codes = qwix.quantize(x, "int8", channelwise_axes=(0,)) if self.has_quantized_inputs else x
        return finish(qwix.dot(codes, self.array).astype(x.dtype), bias, activation)

    def dense(self) -> Array:
        """``qwix.dequantize``."""
        import qwix

        return qwix.dequantize(self.array)


def by_torch(
    source: pathlib.Path, name: str, layers: int | None
) -> Callable[[np.ndarray], list[float]]:
    """Load the model in transformers.

    Args:
        source: Its folder, or a GGUF file.
        name: A name in ``TORCH``.
        layers: Use only this number of first layers; None uses all.

    Returns:
        A function from token ids ``(rows, length)`` to the mean loss of each row.
    """
    import torch
    import transformers

    folder, file = (source, None) if source.is_dir() else (source.parent, source.name)
    options: dict[str, Any] = {} if file is None else {"gguf_file": file}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, **options
    ).eval()
    if layers is not None:
        del model.model.layers[layers:]
    if name == "torchao_w8a8":
        # By name, so that type checkers do not need the package.
        torchao = importlib.import_module("torchao.quantization")
        in_layers = lambda module, path: isinstance(module, torch.nn.Linear) and "layers" in path
        config = torchao.Int8DynamicActivationInt8WeightConfig()
        torchao.quantize_(model, config, filter_fn=in_layers)

    def losses(ids: np.ndarray) -> list[float]:
        given = torch.tensor(ids, dtype=torch.long)
        with torch.inference_mode():
            logits = model(given).logits[:, :-1]
            found = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), given[:, 1:].flatten(), reduction="none"
            )
        return found.view(len(ids), -1).mean(1).tolist()

    return losses
