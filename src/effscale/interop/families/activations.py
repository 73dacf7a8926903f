"""Names of activations in transformers and in effscale."""

from typing import Any

from effscale.interop.foreign import shown
from effscale.interop.tensors import FolderError

# Of several names for the same function, the first is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}


def our_activation(name: str) -> Any:
    """Return effscale's name of an activation."""
    if name not in ACTIVATIONS:
        raise FolderError(
            f"config.json: the activation must be one of {', '.join(ACTIVATIONS)}, got {shown(name)}"
        )
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Return transformers' name of an activation."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise ValueError(f"transformers has no activation like {name!r}")
