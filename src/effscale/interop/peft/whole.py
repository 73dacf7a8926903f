"""Whole modules in an adapter's file, named by PEFT's ``modules_to_save``: heads, and others trained without a pair."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from effscale.interop.foreign import Fields
from effscale.interop.load import misfits
from effscale.interop.peft.modules import START, Modules
from effscale.interop.plan import Slot
from effscale.interop.save import on_host
from effscale.interop.tensors import TensorInfo

CLASSIFIERS = ("classifier", "score")
BY_TASK = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT adds to ``modules_to_save`` by itself, depending on the task of the adapter."""

CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def named(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of whole modules in an adapter's config.

    Raises:
        FolderError: The field is not a list of names.
    """
    given = Fields("adapter_config.json", fields)
    task = given.text("task_type", "")
    return (*given.strings("modules_to_save", []), *BY_TASK.get(task, ()))


def is_meant(path: str, names: Collection[str]) -> bool:
    """Return whether a module, or one that contains it, has one of the names: PEFT compares the end of its path.

    Example:
        >>> is_meant("transformer.h.0.mlp.c_fc", ["mlp"]), is_meant("transformer.ln_f", ["mlp"])
        (True, False)
    """
    parts = path.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(start.endswith(name) for start in paths for name in names)


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two tensors are equal, if either may have been rounded to its dtype."""
    return np.array_equal(one.astype(other.dtype), other) or np.array_equal(
        other.astype(one.dtype), one
    )


class WholeModules:
    """The tensors of whole modules in an adapter's file.

    Attributes:
        found: For each place in the model, the names of the tensors that fill it: two if a head is the embedding.
        wrong: Descriptions of all problems.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], fields: Mapping[str, Any], modules: Modules
    ):
        self.infos, self.modules = infos, modules
        self.names = named(fields)
        self.task = fields.get("task_type")
        self.found: dict[Slot, list[str]] = {}
        self._seen: set[Slot] = set()
        self.wrong: list[str] = []
        self._slots = {modules.family.canonical(t): slot for t, slot in modules.tensors.items()}
        self._meant = {
            slot
            for t, slot in modules.tensors.items()
            if is_meant(t.rpartition(".")[0], self.names)
        }

    def takes(self, name: str) -> bool:
        """Return whether a tensor belongs to a whole module; if so, record it or its problems."""
        tensor = name.removeprefix(START)
        canonical = self.modules.family.canonical(tensor)
        slot = self._slots.get(canonical)
        # One weight can have two names in memory, of which the config may list only one.
        if slot not in self._meant and not is_meant(tensor.rpartition(".")[0], self.names):
            return False
        info = self.infos[name]
        if slot is None:
            self.wrong.append(f"{name}: the model has no such module{self._hint(canonical, info)}")
            return True
        self._seen.add(slot)
        wrong = misfits(name, info, self.modules.shapes[slot.name], "the model needs")
        self.wrong += wrong
        if not wrong:
            self.found.setdefault(slot, []).append(name)
        return True

    def check(self, pairs: Collection[Slot]) -> list[str]:
        """Return all problems, after every tensor was seen; ``pairs`` are the places that have a pair."""
        module = lambda tensor: tensor.rpartition(".")[0]
        tensors = self.modules.tensors
        begun = {module(tensor) for tensor, slot in tensors.items() if slot in self._seen}
        said = [
            f"missing: {START}{tensor}"
            for tensor, slot in tensors.items()
            if (slot in self._meant or module(tensor) in begun) and slot not in self._seen
        ]
        both = [names for slot, names in self.found.items() if slot in pairs]
        said += [f"{names[0]}: a whole weight, in addition to a pair of the same" for names in both]
        for head, twin in self.modules.twins.items():
            if len(self.found.get(twin.slot, [head, twin])) == 1:
                said.append(
                    f"{head} and {twin.name} are one weight in this model, but the adapter changes only one of them; "
                    "PEFT's ensure_weight_tying=True avoids this"
                )
        return self.wrong + said

    def _hint(self, canonical: str, info: TensorInfo) -> str:
        """Return the heads with which the base would have such a module."""
        name, _, kind = canonical.rpartition(".")
        if kind != "weight" or name not in (*CLASSIFIERS, "qa_outputs") or not info.shape:
            return ""
        family = self.modules.family
        tensors = {family.canonical(n.removeprefix(START)): i for n, i in self.infos.items()}
        if self.task != "TOKEN_CLS":
            tensors["pooler.dense.weight"] = info
        fields = {"architectures": [family.class_name + CLASSES.get(str(self.task), "")]}
        heads = family.find_heads({**family.defaults, **fields}, tensors)
        return f"; load the base with heads={heads!r} and a key"


def filled(weight: jax.Array, parts: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Return a weight in which the given parts, by layer, replace its own.

    It has the dtype of the parts, or float32 if some layers keep their own and have another dtype.
    """
    kinds = {array.dtype for array in parts.values()}
    if () in parts:
        return parts[()]
    if len(parts) < weight.shape[0]:
        kinds.add(np.dtype(weight.dtype))
    array = np.array(on_host(weight), kinds.pop() if len(kinds) == 1 else np.float32)
    for index, one in parts.items():
        array[index] = one
    return array
