"""LoRA adapters in PEFT's format: pairs of matrices for the weights of a model, and whole modules."""

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from effscale.interop.companions import write_json
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.torch import TorchFile
from effscale.interop.files.writer import write_tensors
from effscale.interop.folder import checked_folder, read_json
from effscale.interop.peft.config import other_kind, targets, write_scaling
from effscale.interop.peft.modules import Modules, keys, modules_of
from effscale.interop.peft.pairs import join, stack
from effscale.interop.peft.reader import AdapterReader
from effscale.interop.peft.whole import filled
from effscale.interop.peft.whole_writer import (
    heads_trained_whole,
    task_of,
    warn_of_heads,
    whole_tensors,
)
from effscale.interop.plan import values_of
from effscale.interop.save import on_host
from effscale.interop.tensors import FolderError, Tensors
from effscale.models import LoRA, Transformer
from effscale.parallel import shardings
from effscale.paths import local_path, output_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"


def load_adapter(model: Transformer, folder: str | os.PathLike[str]) -> Transformer:
    """Add the LoRA pairs of a PEFT adapter to the weights of its base model.

    The names of the adapter's tensors determine which weights get a pair. Some details:

    - A transformers module that holds query, key and value together (GPT-2, BLOOM, GPT-NeoX) gives all three the same A.
    - effscale stacks weights over layers. A layer without a pair gets zeros, a pair of smaller rank is padded with zeros, and
      a different scale is moved into B as a power of two. All of this is exact.
    - The pairs keep their dtype in the file and are placed like the weights.

    ``merge_lora`` of ``effscale.models`` then merges them into the weights, and ``unmerge_lora`` removes them.

    Modules that the adapter holds whole (``modules_to_save``: a classifier, a reward score, embeddings) replace those of the
    model permanently: ``unmerge_lora`` does not restore them.

    Args:
        model: The base model, as ``effscale.interop.load_pretrained`` returns it, with the heads that the adapter has; or any
            transformer of its shape.
        folder: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the older
            ``adapter_model.bin``.

    Returns:
        A model with ``effscale.models.LoRA`` weights; ``model`` is not changed.

    Raises:
        FolderError: A file is missing or damaged. Or the adapter is of another kind (such as DoRA); it contains trained biases,
            or pairs or whole modules that the model does not have or that have other shapes; or its scales cannot be unified
            without rounding. One error lists all problems.
        ImportError: The weights are in a ``.bin`` file and torch is not installed.
        ValueError: No family has such a model.

    Warns:
        UserWarning: A tensor contains NaN.

    Example:
        >>> import tempfile, jax
        >>> from flax import nnx
        >>> from effscale.interop import load_adapter, save_adapter
        >>> from effscale.models import Transformer, add_lora, gpt2
        >>> config = gpt2(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_length=4)
        >>> base = Transformer(config, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(add_lora(base, rank=2, key=jax.random.key(0), where="attention.out.kernel"), folder)
        ...     adapted = load_adapter(base, folder)
        >>> adapted.groups[0].blocks[0].attention.out.kernel.get_value().a.shape
        (1, 8, 2)
    """
    place = checked_folder(folder)
    fields = read_json(place, CONFIG)
    modules, values = modules_of(model), values_of(model)
    reader = AdapterReader(_open(place), fields, modules, values)
    whole = reader.whole_by_leaf()
    wrong = other_kind(fields) + reader.wrong
    stacked: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for leaf, pairs in reader.by_leaf().items():
        weight = values[leaf]
        if isinstance(weight, LoRA):
            wrong.append(
                f"{leaf} of the model already has a pair; call merge_lora or unmerge_lora first"
            )
            continue
        try:
            stacked[leaf] = stack(pairs, weight.shape)
        except ValueError as error:
            wrong.append(str(error))
    replaced: dict[str, np.ndarray] = {}
    for leaf, parts in whole.items():
        weight = values[leaf]
        if isinstance(weight, jax.Array):
            replaced[leaf] = filled(weight, parts)
        else:
            kind = type(weight).__name__
            wrong.append(f"{leaf} of the model is a {kind}, which a whole weight cannot replace")
    if not wrong and not stacked and not replaced:
        wrong.append("it contains no pair")
    if wrong:
        raise FolderError(
            f"the adapter in {place} cannot be added to this {modules.family.model_type}:\n  "
            + "\n  ".join(wrong)
        )
    graphdef, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        leaf = ".".join(map(str, path))
        if leaf in replaced:
            where = variable.get_value().sharding
            variable = variable.replace(_placed(replaced[leaf], where))
        if leaf in stacked:
            variable = _adapted(variable, *stacked[leaf])
        flat.append((path, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save_adapter(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> None:
    """Write the LoRA pairs of a model as an adapter that ``peft.PeftModel.from_pretrained`` loads.

    If transformers holds query, key and value in one module and their pairs differ, one pair represents all three: their A's
    side by side, and B's of blocks that each multiply their own A. Its rank is the sum of their ranks. Components that are
    zero in A and B, and layers with only such components, are left out. If ranks or scales differ, ``rank_pattern`` and
    ``alpha_pattern`` name the modules that deviate from the most common values.

    A pair of an embedding that is also the head is written for both. PEFT then warns that it does not keep the two in
    sync if they are trained further; its own mechanism for this does not survive saving and loading.

    Args:
        model: A model with LoRA pairs, from ``effscale.models.add_lora`` or ``load_adapter``.
        folder: The folder to write to; created if it does not exist. An adapter in it is replaced.
        base: Folder or name of the base model, to record in the adapter's config.
        modules_to_save: Modules to write whole, by their paths in transformers or the ends of these, such as
            ``("score",)`` or ``("embed_tokens", "lm_head")``: those that were trained without a pair. None: class and value
            heads without a pair, as PEFT does by itself. ``()``: none.

    Raises:
        ValueError: The model has no pair, or no family has such a model; or pairs have no counterpart in PEFT, which
            one error lists; or a module to save whole does not exist.
        FolderError: The files cannot be written to the folder.

    Warns:
        UserWarning: A class or value head is left out, unless ``base`` is a folder that has the same head.
    """
    modules = modules_of(model)
    written = _their_pairs(model, modules)
    values = values_of(model)
    heads = heads_trained_whole(model.config, modules, values)
    names = [*heads.values()] if modules_to_save is None else modules_to_save
    tensors, saved = whole_tensors(modules, values, names)
    left_out = {head: path for head, path in heads.items() if path not in saved}
    warn_of_heads(left_out, modules, values, base)
    for pair in written:
        tensors |= zip(keys(pair.name, embedding=pair.embedding), (pair.a, pair.b), strict=True)
    fields = {
        "peft_type": "LORA",
        "task_type": task_of(model.config, heads.keys() - left_out),
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "target_modules": targets([pair.name for pair in written], modules.names),
        "fan_in_fan_out": any(pair.conv1d for pair in written),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    fields |= write_scaling([(pair.name, pair.a.shape[0], pair.scale) for pair in written])
    place = local_path(folder)
    if place.exists() and not place.is_dir():
        raise FolderError(f"{str(place)!r}: is a file; pass a folder to save into.")
    output_folder(place)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=place) as work:
        (file,) = write_tensors(work, tensors.items(), max_shard_size=2**62)
        # Without a config, the folder is not an adapter, so it never combines one config with other weights.
        (place / CONFIG).unlink(missing_ok=True)
        file.replace(place / WEIGHTS)
    write_json(place / CONFIG, fields)


class _Written(NamedTuple):
    """A pair in the layout of the file."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    embedding: bool = False
    conv1d: bool = False


def _their_pairs(model: Transformer, modules: Modules) -> list[_Written]:
    """Return the model's pairs in the layout of the file.

    Raises:
        ValueError: There are no pairs, or one has no counterpart.
    """
    values = values_of(model)
    widths = {leaf: value.shape[-1] for leaf, value in values.items() if value.shape}
    held = {
        leaf: (on_host(value.a), on_host(value.b), value.scale)
        for leaf, value in values.items()
        if isinstance(value, LoRA)
    }
    if not held:
        raise ValueError("the model has no LoRA pairs to save. Add some with add_lora")
    reached = {leaf for module in modules.adaptable for leaf in module.slot.leaves}
    wrong = [f"{leaf}: PEFT does not support a pair there" for leaf in sorted(set(held) - reached)]
    found: list[_Written] = []
    for module in modules.adaptable:
        try:
            pair = join(module, held, widths)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if pair is None:
            continue
        a, b = module.to_theirs(pair.a, pair.b)
        found.append(_Written(module.name, a, b, pair.scale, module.is_embedding, module.is_conv1d))
        found += [
            _Written(head, b.T, a.T, pair.scale)
            for head, embedding in modules.twins.items()
            if embedding is module
        ]
    if wrong:
        raise ValueError("the model's pairs cannot be saved for PEFT:\n  " + "\n  ".join(wrong))
    if not found:
        raise ValueError("all LoRA pairs of the model are zero, so there is nothing to save")
    return found


def _open(place: pathlib.Path) -> Tensors:
    # A dangling link is an error of that file, not a reason to look further.
    if os.path.lexists(place / WEIGHTS):
        return SafetensorsFile(place / WEIGHTS)
    if os.path.lexists(place / OLD_WEIGHTS):
        return TorchFile(place / OLD_WEIGHTS)
    raise FolderError(f"{str(place)!r}: has no {WEIGHTS} and no {OLD_WEIGHTS}.")


def _adapted(variable: nnx.Variable, a: Any, b: Any, scale: float) -> nnx.Variable:
    """Return the variable with a pair added to its weight, on the devices that hold the weight."""
    weight = variable.get_value()
    where = getattr(jax.tree.leaves(weight)[0], "sharding", None)
    if isinstance(where, NamedSharding):
        places = shardings(variable.replace(LoRA(weight, a, b, scale)), where.mesh).get_value()
        a, b = _placed(a, places.a), _placed(b, places.b)
    elif where is not None and len(where.device_set) == 1:
        a, b = _placed(a, where), _placed(b, where)
    else:
        a, b = jax.device_put((a, b))
    return variable.replace(LoRA(weight, a, b, scale))


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
