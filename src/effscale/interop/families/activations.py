"""Names of activations in transformers, and ours."""

from typing import Any

from effscale.interop.foreign import shown
from effscale.interop.tensors import FolderError

# The first of several that are the same function is the one written.
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
    """Our name of an activation."""
    if name not in ACTIVATIONS:
        raise FolderError(
            f"config.json asks for the activation {shown(name)}; effscale has {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Their name of an activation."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise ValueError(f"transformers has no activation like {name!r}")
