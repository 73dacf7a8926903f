"""Compare a folder's model in effscale and in transformers, layer by layer on the same input."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effscale.interop.describe import describe
from effscale.interop.families.family import named_class
from effscale.interop.foreign import reading
from effscale.interop.load import load_pretrained
from effscale.interop.source import open_source
from effscale.interop.tensors import FolderError
from effscale.interop.tokenizer import MissingTokenizerError, load_tokenizer
from effscale.models import PatchInputs, Transformer, unroll


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two results.

    Attributes:
        name: The result: the embeddings, a layer, or an output.
        largest: The largest absolute difference.
        scale: The largest absolute value in PyTorch's result.
    """

    name: str
    largest: float
    scale: float


def compare(
    folder: str | os.PathLike[str], text: str = "The capital of France is"
) -> list[Difference]:
    """Run the model of a folder in effscale and in transformers, in float32 on the CPU.

    Args:
        folder: A folder that transformers can also load.
        text: The input, if there is a tokenizer; otherwise random token ids or images are used.

    Returns:
        The differences, from the embeddings to the outputs.

    Raises:
        FolderError: The folder cannot be loaded by effscale or by transformers.
        ImportError: torch or transformers is not installed.
    """
    if not os.path.isdir(folder):
        raise FolderError(
            f"{str(folder)!r}: is not a folder, which transformers needs. Convert it first"
        )
    # On other devices, products may be rounded to fewer bits, and the comparison would show that rounding.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = load_pretrained(folder, dtype="float32")
        if any(head.name in ("value", "choice") for head in model.config.heads):
            raise FolderError(
                f"{str(folder)!r}: has a head that transformers does not run as it is. Convert it first"
            )
        inputs = example(folder, model, text)
        streams, outputs = jax.jit(layer_outputs)(unroll(model), jnp.asarray(inputs))
    theirs, their_outputs = torch_outputs(folder, model, inputs)
    names = ["embeddings", *(f"layer {i}" for i in range(1, len(streams)))]
    pairs = list(zip(names, streams, theirs, strict=True))
    pairs += [(name, outputs[name], value) for name, value in their_outputs.items()]
    return [difference(name, np.asarray(ours), value) for name, ours, value in pairs]


def difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Return the largest difference between two arrays of the same shape."""
    if ours.shape != theirs.shape:
        raise FolderError(
            f"{name} has the shape {ours.shape} in effscale and {theirs.shape} in transformers"
        )
    return Difference(name, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


def example(folder: str | os.PathLike[str], model: Transformer, text: str) -> np.ndarray:
    """Return one row of token ids of the text, or one image."""
    generator, inputs = np.random.default_rng(0), model.config.inputs
    if isinstance(inputs, PatchInputs):
        shape = (1, inputs.image_size, inputs.image_size, inputs.channels)
        return generator.normal(size=shape).astype(np.float32)
    limit = model.config.max_length or 512
    try:
        ids = np.asarray(load_tokenizer(folder).encode(text).ids, np.int32)
        if not ids.size:
            raise FolderError(f"text must have at least one token, got {text!r}")
    except MissingTokenizerError:
        ids = generator.integers(0, inputs.vocab_size, min(limit, 32)).astype(np.int32)
    return ids[None, :limit]


def layer_outputs(model: Transformer, inputs: jax.Array) -> tuple[list[jax.Array], dict[str, Any]]:
    """Return the residual stream before and after each layer of an unrolled model, and its outputs."""
    streams: list[jax.Array] = []

    def run_group(index, group, x, context, cache, key):
        del index
        if not streams:
            streams.append(x)
        x, cache, reports = group(x, context, cache, key)
        streams.append(x)
        return x, cache, reports

    encoded = model.encode(inputs, run_group=run_group)
    outputs = model.outputs(encoded.hidden)
    return streams, outputs if isinstance(outputs, dict) else {"lm": outputs}


def torch_outputs(
    folder: str | os.PathLike[str], model: Transformer, inputs: np.ndarray
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return the same from transformers, with its outputs under effscale's names."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"comparing needs torch and transformers ({error}): install them with pip install torch transformers"
        ) from error
    source = open_source(folder)
    _, described = describe(model.config, source.family.model_type)
    fields = {name: value for name, value in source.fields.items() if name != "model_type"}
    with reading(f"transformers cannot read the config.json in {str(folder)!r}", Exception):
        config = transformers.AutoConfig.for_model(source.family.model_type, **fields)
    name = named_class(fields) or described["architectures"][0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise FolderError(f"transformers {transformers.__version__} has no class {name!r}")
    settings = {"config": config, "dtype": torch.float32, "local_files_only": True}
    try:
        theirs, found = kind.from_pretrained(folder, output_loading_info=True, **settings)
    except (OSError, ValueError) as error:
        raise FolderError(f"transformers cannot load {str(folder)!r}: {error}") from error
    if found["missing_keys"] or found["mismatched_keys"]:
        raise FolderError(
            f"{str(folder)!r}: transformers does not find all tensors of a {name}. Convert it first"
        )
    layers = next(
        module
        for module in theirs.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_layers
    )
    first = lambda value: (value[0] if isinstance(value, tuple) else value).detach().numpy()
    streams: list[np.ndarray] = []
    layers[0].register_forward_pre_hook(lambda module, args: streams.append(first(args)))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: streams.append(first(out)))
    image = inputs.ndim == 4
    x = torch.tensor(inputs.transpose(0, 3, 1, 2) if image else inputs.astype(np.int64))
    with torch.inference_mode():
        result = theirs.eval()(x)
    return streams, their_names(result, [head.name for head in model.config.heads])


def their_names(result: Any, heads: list[str]) -> dict[str, np.ndarray]:
    """Return transformers' outputs under effscale's names."""
    import torch

    if "start_logits" in result:
        return {"span": torch.stack([result.start_logits, result.end_logits], -1).numpy()}
    names = {"last_hidden_state": "hidden", "pooler_output": "pooled"}
    names |= {"prediction_logits": "mlm", "seq_relationship_logits": "nsp"}
    if heads:
        names["logits"] = heads[0]
    return {
        ours: result[name].numpy() for name, ours in names.items() if result.get(name) is not None
    }
