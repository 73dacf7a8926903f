"""From a model to a folder that transformers loads."""

import collections
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from jax.experimental import multihost_utils

from effscale.interop.companions import Companions, model_type_of
from effscale.interop.describe import describe
from effscale.interop.families import Family
from effscale.interop.files.writer import parse_size, write_tensors
from effscale.interop.load import convert, float_type
from effscale.interop.plan import Slot, parameters, plan
from effscale.interop.table import sizes
from effscale.models import LMHead, Transformer, dense

ToTheirs = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From arrays of ours, one for each parameter that belongs to a tensor of theirs, to an array laid out as that tensor."""


class StoredSlot(NamedTuple):
    """Where a tensor lies: its name in files, its name in transformers' model in memory, and what it is made of."""

    name: str
    memory_name: str
    slot: Slot


Store = Callable[[StoredSlot, tuple[Any, ...], ToTheirs], Iterable[tuple[str, np.ndarray]] | None]
"""How weights become tensors in a file.

From where a tensor lies, our weights that belong there (of one layer, with NumPy's arrays), and what turns arrays of ours into
theirs, to names and arrays; None leaves the tensor to be written as a dense array.
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
    """Writes a model as transformers would: safetensors, ``config.json`` and, where told from where, the tokenizer.

    A weight with structure (a LoRA pair, a packed one) is written as the dense array that it stands for. A value head,
    as of a DeepSpeed-Chat reward model, becomes the ``score`` of a sequence classifier with one label.

    Args:
        model: Any transformer that one of the families can express, however it was made. Where several can, the first does: a
            Mistral without windows becomes a Llama, unless ``like`` is a Mistral.
        folder: Where to; made if it is not there.
        dtype: Type of the numbers: float32, bfloat16 or float16. None: as the model holds them, tensor by tensor.
        max_shard_size: Bytes in a file at most, such as ``"5GB"``; a larger model gets several files and an index.
        like: The folder (or GGUF file) of the model that this one came from. Its tokenizer, generation and preprocessor files go along,
            and so do those fields of its ``config.json`` that do not tell the model's shape (special tokens, names
            of labels where there are as many).
        tokenizer: A tokenizer to write; instead of that of ``like``.

    Raises:
        ValueError: If no family can express the model.
        FolderError: If ``like`` is no model folder, or the folder cannot take the files.
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
    """Writes a model folder; see ``save_pretrained``.

    Args:
        model: As there.
        folder: As there.
        dtype: As there.
        max_shard_size: As there.
        like: As there.
        tokenizer: As there.
        store: Writes weights with structure in another way.
        fields: Further fields of ``config.json``.
        metadata: For the header of each file; see ``effscale.interop.files.writer.write_tensors``.
    """
    more, (family, fields) = fields or {}, describe(model.config, model_type_of(like))
    chosen = None if dtype is None else float_type(dtype)
    parse_size(max_shard_size)
    largest = max(
        (v.get_value() for v in parameters(model).values()), key=lambda w: math.prod(w.shape)
    )
    fields["dtype"] = np.dtype(chosen or largest.dtype).name
    companions = Companions({**fields, **more}, like, tokenizer)
    place = pathlib.Path(folder)
    tensors = their_tensors(model, chosen, store, family)
    if jax.process_index() == 0:
        # With no config there the folder is no model: it never holds the config of one and the weights of another.
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
    """Where a model's tensors lie in a file of its family, in the order of the table.

    Raises:
        ValueError: If no family can express the model.
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
    """The model's tensors under their names in files of its family, in the order of the table, one at a time."""
    family = describe(model.config)[0] if family is None else family
    leaves = parameters(model)
    axes = sizes(model.config)
    places = stored_slots(model, family)
    untied = any(isinstance(head, LMHead) and not head.tied for head in model.config.heads)
    # Where nothing is tied, transformers wants both names of what would be: BERT has a bias of two names.
    names = {place.slot.name for place in places}
    repeats = {o: r for r, o in family.tied.items() if r not in names} if untied else {}
    for place in places:
        slot = place.slot
        weights = [leaves[leaf].get_value() for leaf in slot.leaves]
        weights = [part(w, slot.index) if slot.index else w for w in weights]
        if store is not None:
            on_hosts = tuple(jax.tree.map(gathered, weight) for weight in weights)
            to_theirs = lambda arrays, slot=slot: slot.rule.to_theirs(arrays, axes)
            stored = store(place, on_hosts, to_theirs)
            if stored is not None:
                yield from stored
                continue
        tensor = slot.rule.to_theirs([on_host(weight) for weight in weights], axes)
        if dtype is not None:
            tensor = convert(slot.name, tensor, dtype)
        tensor = np.ascontiguousarray(tensor)
        yield place.name, tensor
        if slot.name in repeats:
            yield repeats[slot.name], tensor


def on_host(weight: Any) -> np.ndarray:
    """The dense array of a weight; of one that lies on several processes, in each of them."""
    return gathered(dense(weight))


def gathered(array: Any) -> np.ndarray:
    """An array on the host; one that lies on several processes is gathered in each of them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


@jax.jit
def part(weight: Any, index: tuple[Any, ...]) -> Any:
    """One layer or expert of a stacked weight: a small array of its own, whose copy on the host is not kept by the model's."""
    for i in index:
        take = lambda x, i=i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        weight = jax.tree.map(take, weight)
    return weight
