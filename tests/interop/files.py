"""Models of random bits, and safetensors files read and written without the code under test."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from effscale.models import Transformer, TransformerConfig, abstract_model

DTYPES = ("float32", "float16", "bfloat16")
CODES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("float64"),
    "I64": np.dtype("int64"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
SPECIAL = {
    "float32": (0x7F800000, 0xFF800000, 0x7F800001, 0x7FC12345, 0xFFFFFFFF, 0x80000000, 1, 0),
    "float16": (0x7C00, 0xFC00, 0x7C01, 0x7E2A, 0xFFFF, 0x8000, 1, 0),
    "bfloat16": (0x7F80, 0xFF80, 0x7F81, 0x7FD5, 0xFFFF, 0x8000, 1, 0),
}
NAMES = {dtype: code for code, dtype in CODES.items()}

Tensors = dict[str, np.ndarray]


def random_bits(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any bits, with infinities, signaling and quiet numbers that are none, denormal ones and both zeros among them."""
    kind = np.dtype(jnp.dtype(dtype))
    unsigned = np.dtype(f"uint{8 * kind.itemsize}")
    bits = random.integers(0, 2 ** (8 * kind.itemsize), shape, dtype=unsigned)
    special = random.choice(np.array(SPECIAL[dtype], unsigned), shape)
    return np.where(random.random(shape) < 0.1, special, bits).view(kind)


def model_of_bits(config: TransformerConfig, dtype: str, seed: int = 0) -> Transformer:
    """A model of random bits."""
    random = np.random.default_rng(seed)
    fill = lambda leaf: jnp.asarray(random_bits(random, leaf.shape, dtype))
    return jax.tree.map(fill, abstract_model(config))


def model_of_numbers(
    config: TransformerConfig, dtype: str = "float32", seed: int = 0
) -> Transformer:
    """A model of usual numbers."""
    random = np.random.default_rng(seed)
    fill = lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.dtype(dtype))
    return jax.tree.map(fill, abstract_model(config))


def bits_of(model: Transformer) -> dict[str, tuple[Any, ...]]:
    """Type, shape and bytes of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


def read_file(path: pathlib.Path) -> Tensors:
    """The tensors of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], CODES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }


def read_folder(folder: pathlib.Path) -> Tensors:
    """The tensors of all safetensors files of a folder."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_file(path)
    return tensors


def write_folder(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], config: Any
) -> pathlib.Path:
    """A model folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, array in tensors.items():
        end = place + array.nbytes
        entry = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": (place, end)}
        header[name], place = entry, end
    text = json.dumps(header).encode()
    body = b"".join(array.tobytes() for array in tensors.values())
    whole = len(text).to_bytes(8, "little") + text + body
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bytes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Type, shape and bytes of every tensor."""
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in tensors.items()}


def size_of(tensors: Mapping[str, np.ndarray]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(array.shape) * array.itemsize for array in tensors.values())
