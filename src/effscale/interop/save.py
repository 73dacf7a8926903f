"""From a model to a folder that transformers loads."""

import collections
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers
from jax.experimental import multihost_utils

from effscale.interop.companions import Companions
from effscale.interop.describe import describe
from effscale.interop.files.writer import parse_size, write_tensors
from effscale.interop.load import convert, float_type
from effscale.interop.plan import parameters, plan
from effscale.interop.table import sizes
from effscale.models import LMHead, Transformer, dense


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
        model: Any transformer that one of the eight families can express, however it was made.
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
    _, fields = describe(model.config)
    chosen = None if dtype is None else float_type(dtype)
    parse_size(max_shard_size)
    largest = max(
        (v.get_value() for v in parameters(model).values()), key=lambda w: math.prod(w.shape)
    )
    fields["dtype"] = np.dtype(chosen or largest.dtype).name
    companions = Companions(fields, like, tokenizer)
    place = pathlib.Path(folder)
    tensors = their_tensors(model, chosen)
    if jax.process_index() == 0:
        # With no config there the folder is no model: it never holds the config of one and the weights of another.
        forget = lambda: (place / "config.json").unlink(missing_ok=True)
        write_tensors(place, tensors, max_shard_size=max_shard_size, before_move=forget)
        companions.write(place)
    else:
        collections.deque(tensors, maxlen=0)  # every process takes part in gathering, one writes
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def their_tensors(
    model: Transformer, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors under their names in files, in the order of the table, one at a time."""
    family, _ = describe(model.config)
    leaves = parameters(model)
    axes = sizes(model.config)
    slots = plan(family.rules, model.config, leaves)
    untied = any(isinstance(head, LMHead) and not head.tied for head in model.config.heads)
    # Where nothing is tied, transformers wants both names of what would be: BERT has a bias of two names.
    names = {slot.name for slot in slots}
    repeats = {o: r for r, o in family.tied.items() if r not in names} if untied else {}
    for slot in slots:
        weights = [leaves[leaf].get_value() for leaf in slot.leaves]
        ours = [on_host(part(w, slot.index) if slot.index else w) for w in weights]
        tensor = slot.rule.to_theirs(ours, axes)
        if dtype is not None:
            tensor = convert(slot.name, tensor, dtype)
        tensor = np.ascontiguousarray(tensor)
        yield family.stored_name(slot, model.config.heads), tensor
        if slot.name in repeats:
            yield repeats[slot.name], tensor


def on_host(weight: Any) -> np.ndarray:
    """The dense array of a weight; of one that lies on several processes, in each of them."""
    array = dense(weight)
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
