"""A summary of a model folder without loading it: only tensors that repeat another are read, to compare them."""

import collections
import os
from typing import Any

import numpy as np

from effscale.interop.families.family import named_class
from effscale.interop.load import check_tensors
from effscale.interop.plan import parameters, plan
from effscale.interop.source import Source, open_source
from effscale.interop.tensors import FolderError
from effscale.models import PatchInputs, TransformerConfig, abstract_model, num_params
from effscale.moe import MoEConfig


def summarize(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the family, sizes, number of parameters and dtypes of the model in a folder.

    Raises:
        FolderError: It is not a model folder or GGUF file.
    """
    source = open_source(folder)
    leaves = parameters(abstract_model(source.config))
    problems = ""
    try:
        check_tensors(source, plan(source.rules, source.config, leaves), leaves)
    except FolderError as error:
        problems = str(error)
    config, block = source.config, source.config.blocks[0]
    rows = {
        "family": source.family.model_type,
        "architecture": named_class(source.fields) or "not named",
        "parameters": f"{num_params(config):,}",
        "stored as": _types(source),
        "layers": str(config.num_layers),
        "width": str(config.d_model),
        "heads": f"{block.attention.num_heads} of {block.attention.width(config.d_model)}",
        "feed-forward": _feed_forwards(config),
        "positions": _positions(config),
        "outputs": ", ".join(head.name for head in config.heads) or "hidden states",
    }
    if problems:
        rows["problems"] = problems
    if block.attention.kv_heads != block.attention.num_heads:
        rows["heads"] += f", key and value: {block.attention.kv_heads}"
    if isinstance(config.inputs, PatchInputs):
        inputs = config.inputs
        rows["images"] = f"{inputs.image_size} pixels, patches of {inputs.patch_size}"
    else:
        rows["vocabulary"] = f"{config.inputs.vocab_size:,}"
    return rows


def mapping(folder: str | os.PathLike[str]) -> list[tuple[str, str, str, str]]:
    """Return each tensor's name in the file, shape and dtype, the parameter in effscale, and the einops pattern of its layout."""
    source = open_source(folder)
    slots = plan(source.rules, source.config, parameters(abstract_model(source.config)))
    rows = []
    for slot in slots:
        info = source.tensors.infos.get(slot.name)
        known = "missing" if info is None else f"{list(info.shape)} {info.dtype.name}"
        where = f"[{', '.join(map(str, slot.index))}]" if slot.index else ""
        ours = ", ".join(leaf + where for leaf in slot.leaves)
        rows.append((slot.name, known, ours, slot.rule.layout or "as it is"))
    return rows


def _types(source: Source) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for name in source.names:
        info = source.tensors.infos[name]
        counts[info.dtype.name] += int(np.prod(info.shape, dtype=np.int64))
    return ", ".join(f"{name} ({count:,})" for name, count in counts.most_common())


def _feed_forwards(config: TransformerConfig) -> str:
    """Describe the widths and numbers of experts of the kinds of layers."""
    found: dict[str, None] = {}
    for block in config.blocks:
        part: Any = block.feed_forward
        if isinstance(part, MoEConfig):
            expert: Any = part.expert
            found[f"{part.num_experts} experts of {expert.d_ff}, {part.router.k} per token"] = None
        else:
            found[str(part.d_ff)] = None
    return "; ".join(found)


def _positions(config: Any) -> str:
    kind = type(config.positions).__name__
    return kind if config.max_length is None else f"{kind}, {config.max_length}"
