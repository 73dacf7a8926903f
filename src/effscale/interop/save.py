"""Save a model as a folder that transformers loads."""

import collections
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from jax.experimental import multihost_utils

from effscale.interop.companions import Companions, model_type_of
from effscale.interop.describe import describe
from effscale.interop.families.family import Family
from effscale.interop.files.writer import parse_size, write_tensors
from effscale.interop.load import convert, float_type
from effscale.interop.plan import Slot, parameters, plan, values_of
from effscale.interop.table import sizes
from effscale.models import LMHead, Transformer
from effscale.models.weights import dense
from effscale.parallel.placement import gathered
from effscale.paths import local_path

ToTheirs = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Converts arrays of effscale, one for each parameter of a tensor, to an array in the tensor's layout."""


class StoredSlot(NamedTuple):
    """The place of a tensor: its name in files, its name in transformers' model in memory, and its source."""

    name: str
    memory_name: str
    slot: Slot


Store = Callable[[StoredSlot, tuple[Any, ...], ToTheirs], Iterable[tuple[str, np.ndarray]] | None]
"""Converts weights to tensors in a file.

Its arguments are the place of a tensor, the weights of one layer that belong there (as NumPy arrays), and the conversion
of arrays to the tensor's layout. It returns names and arrays, or None to write the tensor as a dense array.
"""


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    like: str | os.PathLike[str] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Write a model like transformers: safetensors, ``config.json`` and, if a source is given, the tokenizer.

    A structured weight (a LoRA pair, a packed weight) is written as the dense array that it represents. A value head,
    as in a DeepSpeed-Chat reward model, becomes the ``score`` of a sequence classifier with one label.

    Args:
        model: Any transformer that a family can express, regardless of how it was created. If several can, the first is
            used: a Mistral without windows becomes a Llama unless ``like`` is a Mistral.
        folder: The folder to write to; created if it does not exist.
        dtype: Dtype of the numbers: float32, bfloat16 or float16. None: as in the model, tensor by tensor.
        max_shard_size: Maximum size of a file, such as ``"5GB"``; a larger model is split into several files with an index.
        like: The folder (or GGUF file) of the original model. Its tokenizer, generation and preprocessor files are copied,
            as are the fields of its ``config.json`` that do not depend on the model's shape (special tokens, and names
            of labels if their number is the same).
        tokenizer: A tokenizer to write instead of that of ``like``.

    Raises:
        ValueError: No family can express the model.
        FolderError: ``like`` is not a model folder, or the files cannot be written to the folder.
    """
    write_model(
        model,
        folder,
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like,
        tokenizer=tokenizer,
    )


def write_model(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    like: str | os.PathLike[str] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    store: Store | None = None,
    fields: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder; see ``save_pretrained``. ``store`` writes structured weights in another form, ``fields`` are added to
    ``config.json``, and ``metadata`` to the header of each file (``effscale.interop.files.writer.write_tensors``).
    """
    more, (family, fields) = fields or {}, describe(model.config, model_type_of(like))
    chosen = None if dtype is None else float_type(dtype)
    parse_size(max_shard_size)
    largest = max(values_of(model).values(), key=lambda weight: math.prod(weight.shape))
    fields["dtype"] = np.dtype(chosen or largest.dtype).name
    companions = Companions({**fields, **more}, like, tokenizer)
    place = local_path(folder)
    tensors = their_tensors(model, chosen, store, family)
    if jax.process_index() == 0:
        # Without a config, the folder is not a model, so it never combines one config with other weights.
        forget = lambda: (place / "config.json").unlink(missing_ok=True)
        write_tensors(
            place,
            tensors,
            max_shard_size=max_shard_size,
            before_move=forget,
            metadata=metadata,
        )
        companions.write(place)
    else:
        collections.deque(tensors, maxlen=0)  # every process takes part in gathering, one writes
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def stored_slots(model: Transformer, family: Family | None = None) -> list[StoredSlot]:
    """Return the places of a model's tensors in a file of its family, in the order of the table.

    Raises:
        ValueError: No family can express the model.
    """
    family = describe(model.config)[0] if family is None else family
    found = []
    for slot in plan(family.rules, model.config, parameters(model)):
        name = family.stored_name(slot, model.config.heads)
        found.append(StoredSlot(name, family.memory_name(name), slot))
    return found


def their_tensors(
    model: Transformer,
    dtype: np.dtype | None = None,
    store: Store | None = None,
    family: Family | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the model's tensors under their names in files of its family, in the order of the table, one at a time."""
    family = describe(model.config)[0] if family is None else family
    values = values_of(model)
    axes = sizes(model.config)
    places = stored_slots(model, family)
    untied = any(isinstance(head, LMHead) and not head.tied for head in model.config.heads)
    # If nothing is tied, transformers needs both names of tensors that could be: BERT has a bias with two names.
    names = {place.slot.name for place in places}
    repeats = {o: r for r, o in family.tied.items() if r not in names} if untied else {}
    for place in places:
        slot = place.slot
        if store is not None:
            on_hosts = tuple(jax.tree.map(gathered, weight) for weight in _own(slot, values))
            to_theirs = lambda arrays, slot=slot: slot.rule.to_theirs(arrays, axes)
            stored = store(place, on_hosts, to_theirs)
            if stored is not None:
                yield from stored
                continue
        tensor = stored_array(slot, values, axes)
        if dtype is not None:
            tensor = convert(slot.name, tensor, dtype)
        yield place.name, tensor
        if slot.name in repeats:
            yield repeats[slot.name], tensor


def stored_array(slot: Slot, values: Mapping[str, Any], axes: Mapping[str, int]) -> np.ndarray:
    """Return a tensor as files have it, from the weights of the model by path."""
    weights = [on_host(weight) for weight in _own(slot, values)]
    return np.ascontiguousarray(slot.rule.to_theirs(weights, axes))


def _own(slot: Slot, values: Mapping[str, Any]) -> list[Any]:
    weights = [values[leaf] for leaf in slot.leaves]
    return [part(w, slot.index) if slot.index else w for w in weights]


def on_host(weight: Any) -> np.ndarray:
    """Return the dense array of a weight; if it spans several processes, in each of them."""
    return gathered(dense(weight))


@jax.jit
def part(weight: Any, index: tuple[Any, ...]) -> Any:
    """Return one layer or expert of a stacked weight, as a separate small array whose host copy the model does not keep."""
    for i in index:
        take = lambda x, i=i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        weight = jax.tree.map(take, weight)
    return weight
