"""From a model to a folder that transformers loads."""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers

from effscale.data import save_tokenizer, separator_id
from effscale.interop.describe import describe
from effscale.interop.folder import read_json
from effscale.interop.gguf_files import gguf_config
from effscale.interop.gguf_tokenizer import gguf_tokenizer
from effscale.interop.load import convert, float_type
from effscale.interop.plan import parameters, plan
from effscale.interop.source import gguf_path
from effscale.interop.table import sizes
from effscale.interop.writer import write_tensors
from effscale.models import LMHead, Transformer, dense

# What goes along from another folder.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json",
)  # fmt: skip
# Fields of another config.json that may contradict what is written, under other names.
STALE = (
    "torch_dtype", "quantization_config", "auto_map", "num_labels", "id2label", "label2id", "classifier_dropout",
    "n_embed", "num_attention_heads", "num_hidden_layers", "rope_scaling", "rope_theta", "rotary_pct",
    "rotary_emb_base", "partial_rotary_factor", "transformers_version", "_name_or_path",
)  # fmt: skip


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
    gguf = None if like is None else gguf_path(pathlib.Path(like))
    if gguf is not None:
        inherited, tokenizer = gguf_config(gguf), tokenizer or gguf_tokenizer(gguf)
    else:
        inherited = {} if like is None else read_json(like, "config.json")
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    leaves = parameters(model)
    largest = (
        chosen
        or max((v.get_value() for v in leaves.values()), key=lambda w: math.prod(w.shape)).dtype
    )
    fields["dtype"] = np.dtype(largest).name
    write_tensors(place, their_tensors(model, chosen), max_shard_size=max_shard_size)
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    merged = special | merge(inherited, fields)
    if tokenizer is not None and merged["eos_token_id"] is None:
        merged["eos_token_id"] = separator_id(tokenizer)
    write_json(place / "config.json", merged)
    if like is not None and gguf is None and pathlib.Path(like).resolve() != place.resolve():
        for name in COMPANIONS:
            if (pathlib.Path(like) / name).is_file():
                shutil.copyfile(pathlib.Path(like) / name, place / name)
    if tokenizer is not None:
        save_tokenizer(tokenizer, place)
        end = tokenizer.id_to_token(merged["eos_token_id"])
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        write_json(place / "tokenizer_config.json", settings)


def their_tensors(
    model: Transformer, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors under their names in files, in the order of the table, one at a time."""
    family, _ = describe(model.config)
    leaves = parameters(model)
    axes = sizes(model.config)
    slots = plan(family.rules, model.config, leaves)
    prefix = family.prefix_with(model.config.heads)
    untied = any(isinstance(head, LMHead) and not head.tied for head in model.config.heads)
    # Where nothing is tied, transformers wants both names of what would be: BERT has a bias of two names.
    names = {slot.name for slot in slots}
    repeats = {o: r for r, o in family.tied.items() if r not in names} if untied else {}
    held: dict[str, np.ndarray] = {}
    for slot in slots:
        if not set(slot.leaves) <= set(held):
            held = {leaf: on_host(leaves[leaf].get_value()) for leaf in slot.leaves}
        ours = [
            held[leaf] if slot.index is None else held[leaf][slot.index] for leaf in slot.leaves
        ]
        tensor = slot.rule.to_theirs(ours, axes)
        if dtype is not None:
            tensor = convert(slot.name, tensor, dtype)
        tensor = np.ascontiguousarray(tensor)
        if slot.rule in family.trunk:
            yield prefix + slot.name, tensor
        else:
            yield "score.weight" if slot.name == "v_head.weight" else slot.name, tensor
        if slot.name in repeats:
            yield repeats[slot.name], tensor


def merge(inherited: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of another model brought up to date; names of labels stay where their number fits."""
    kept = {name: value for name, value in inherited.items() if name not in STALE}
    merged = kept | {name: value for name, value in fields.items() if name != "add_pooling_layer"}
    names = inherited.get("id2label")
    if "rope_parameters" in fields and "max_position_embeddings" in inherited:
        # Nothing depends on it; what the model was published with says more than what its scaling lets expect.
        merged["max_position_embeddings"] = inherited["max_position_embeddings"]
    if names and len(names) == len(fields.get("id2label", {})):
        merged |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    return merged


def write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def on_host(weight: Any) -> np.ndarray:
    array = dense(weight)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
