"""Whole modules of a model in an adapter: which heads are saved, and in which form."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from effscale.interop.peft.modules import START, Modules
from effscale.interop.peft.whole import same_numbers
from effscale.interop.plan import Slot
from effscale.interop.save import stored_array
from effscale.interop.source import open_source
from effscale.interop.tensors import FolderError
from effscale.models import ClassHead, LMHead, LoRA, TokenInputs, TransformerConfig

TASKS = {
    "classes": "SEQ_CLS",
    "score": "SEQ_CLS",
    "value": "SEQ_CLS",
    "token_classes": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "choice": None,
}
"""Heads that are trained whole together with an adapter, and their task in PEFT, if it has one."""


def heads_trained_whole(
    config: TransformerConfig, modules: Modules, values: Mapping[str, Any]
) -> dict[str, str]:
    """Return the names of class and value heads without a pair, and of their modules in transformers."""
    found: dict[str, str] = {}
    for tensor, slot in modules.tensors.items():
        kind, name, *_ = slot.leaves[0].split(".")
        if kind == "heads" and name in TASKS:
            found[name] = tensor.rpartition(".")[0]
    paired = {path.split(".")[1] for path, value in values.items() if isinstance(value, LoRA)}
    heads = [head.name for head in config.heads if isinstance(head, ClassHead)]
    return {name: found[name] for name in heads if name in found and name not in paired}


def task_of(config: TransformerConfig, saved: Collection[str]) -> str | None:
    """Return PEFT's task of an adapter that is saved with these heads; its class tasks are for texts."""
    if len(config.heads) != 1 or not isinstance(config.inputs, TokenInputs):
        return None
    (head,) = config.heads
    if isinstance(head, LMHead) and head.name == "lm":
        return "CAUSAL_LM"
    return TASKS.get(head.name) if head.name in saved else None


def whole_tensors(
    modules: Modules, values: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the tensors of whole modules for an adapter's file, and the paths of these modules.

    The paths are complete, because PEFT compares ends: ``attn`` would also match ``c_attn``. If a head is the embedding,
    both are written.

    Args:
        modules: The modules of the model.
        values: The weights of the model, by path.
        names: Paths of modules in transformers, or their ends after a dot.

    Raises:
        ValueError: A name does not match a module, or a module cannot be written.
    """
    if isinstance(names, str):
        raise ValueError(
            f"modules_to_save must be a tuple of names, such as ({names!r},), got {names!r}"
        )
    paths = {tensor: _within(tensor, names) for tensor in modules.tensors}
    unknown = [name for name in names if not any(_within(t, [name]) for t in modules.tensors)]
    if unknown:
        ends = sorted({name.rpartition(".")[2] for name in modules.names})
        raise ValueError(
            f"modules_to_save must name modules, whose names in transformers end in {', '.join(ends)}, got {unknown}"
        )
    chosen = {slot for tensor, slot in modules.tensors.items() if paths[tensor]}
    found: dict[str, np.ndarray] = {}
    wrong = []
    for tensor, slot in modules.tensors.items():
        if slot not in chosen:
            continue
        weights = [values[leaf] for leaf in slot.leaves]
        if any(isinstance(weight, LoRA) for weight in weights):
            wrong.append(
                f"{tensor} has a pair; merge it with merge_lora, or remove it from modules_to_save"
            )
        elif slot.rule.in_expert:
            wrong.append(f"{tensor}: all experts are one tensor in transformers' memory")
        else:
            found[f"{START}{tensor}"] = stored_array(slot, values, modules.axes)
    if wrong:
        raise ValueError("the model's modules cannot be saved for PEFT:\n  " + "\n  ".join(wrong))
    saved = [
        paths[t] or t.rpartition(".")[0] for t, slot in modules.tensors.items() if slot in chosen
    ]
    return found, [*dict.fromkeys(saved)]


def _within(tensor: str, names: Sequence[str]) -> str | None:
    """Return the path of the module with one of the names that contains a tensor, or None.

    Example:
        >>> _within("transformer.h.0.attn.c_attn.weight", ["attn"])
        'transformer.h.0.attn'
    """
    parts = tensor.split(".")[:-1]
    paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((p for p in paths if any(f".{p}".endswith(f".{name}") for name in names)), None)


def warn_of_heads(
    left_out: Mapping[str, str],
    modules: Modules,
    values: Mapping[str, Any],
    base: str | os.PathLike[str] | None,
) -> None:
    """Warn about heads that are neither in the adapter nor, with the same values, in the folder of its base."""
    for head, name in left_out.items():
        slots = {t: slot for t, slot in modules.tensors.items() if t.startswith(f"{name}.")}
        if not _is_in(base, slots, modules, values):
            warnings.warn(
                f"the adapter is saved without the head {head!r} ({', '.join(slots)}): what that head has learned is lost "
                f"unless the base has the same head. Set modules_to_save=({name!r},) to save it, too",
                stacklevel=3,
            )


def _is_in(
    base: str | os.PathLike[str] | None,
    slots: Mapping[str, Slot],
    modules: Modules,
    values: Mapping[str, Any],
) -> bool:
    """Return whether the base is a local folder that has these tensors."""
    if base is None or not os.path.isdir(base):
        return False
    try:
        source = open_source(base)
    except FolderError:
        return False
    for tensor, slot in slots.items():
        name = modules.family.canonical(tensor)
        if name not in source.names or source.tensors.infos[name].form is not None:
            return False
        if not same_numbers(
            np.asarray(source.tensors.read(name)), stored_array(slot, values, modules.axes)
        ):
            return False
    return True
