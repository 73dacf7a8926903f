"""The pairs and whole modules in an adapter's file by the modules of a model, and all problems found."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.interop.load import has_nan, misfits
from effscale.interop.peft.config import read_scaling
from effscale.interop.peft.modules import START, Module, Modules, keys
from effscale.interop.peft.pairs import Pair
from effscale.interop.peft.whole import WholeModules, same_numbers
from effscale.interop.save import stored_array
from effscale.interop.tensors import Tensors

KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:[AB]\.weight|embedding_[AB])")


class AdapterReader:
    """Read all pairs and whole modules of an adapter's file.

    Attributes:
        pairs: The valid pairs, by module.
        whole: The whole modules.
        wrong: Descriptions of all problems.
    """

    def __init__(
        self,
        tensors: Tensors,
        fields: Mapping[str, Any],
        modules: Modules,
        values: Mapping[str, Any],
    ):
        self.tensors, self.modules, self.values = tensors, modules, values
        self.scaling = read_scaling(fields)
        self.whole = WholeModules(tensors.infos, fields, modules)
        self.wrong: list[str] = []
        self.pairs: dict[Module, Pair] = {}
        heads: dict[Module, Pair] = {}
        by_name = {modules.canonical(module.name): module for module in modules.adaptable}
        twins = {modules.canonical(name): module for name, module in modules.twins.items()}
        every = set(map(modules.canonical, modules.names))
        by_path: dict[str, set[str]] = {}
        for name in sorted(tensors.infos):
            if match := KEY.fullmatch(name):
                by_path.setdefault(match[1], set()).add(name)
            else:
                self._check_other(name, every)
        for path, names in by_path.items():
            known = modules.canonical(path)
            if known in by_name:
                self._add(self.pairs, by_name[known], path, names)
            elif known in twins:
                self._add(heads, twins[known], path, names, twin=True)
            elif known in every:
                self.wrong.append(f"{path}: PEFT does not support a pair in this module")
            else:
                self.wrong.append(f"{path}: this model has no such module")
        self._check_twins(heads)
        self.wrong += self.whole.check({module.slot for module in (*self.pairs, *heads)})

    def by_leaf(self) -> dict[str, dict[tuple[int, ...], Pair]]:
        """Return the pairs by effscale's parameters, and for each by layer and expert."""
        found: dict[str, dict[tuple[int, ...], Pair]] = {}
        for module, pair in self.pairs.items():
            for leaf, b in zip(module.slot.leaves, pair.b, strict=True):
                one = dataclasses.replace(pair, b=(b,))
                found.setdefault(leaf, {})[module.slot.index] = one
        return found

    def whole_by_leaf(self) -> dict[str, dict[tuple[int, ...], np.ndarray]]:
        """Return the whole weights by effscale's parameters, and for each by layer; records an error if two names differ."""
        found: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
        for slot, names in self.whole.found.items():
            first, *others = [self._read(name) for name in names]
            if any(other.tobytes() != first.tobytes() for other in others):
                self.wrong.append(f"{' and '.join(names)} are one weight in this model, but differ")
            ours = slot.rule.to_ours(first, self.modules.axes)
            for leaf, array in zip(slot.leaves, ours, strict=True):
                found.setdefault(leaf, {})[slot.index] = array
        return found

    def _add(
        self,
        found: dict[Module, Pair],
        module: Module,
        path: str,
        names: set[str],
        *,
        twin: bool = False,
    ) -> None:
        if module in found:
            self.wrong.append(f"{path}: a second pair, in addition to that of {found[module].name}")
            return
        rank = self.scaling.rank_of(path)
        shapes = module.shapes(rank)
        if twin:  # the transpose of the embedding's pair
            shapes = (shapes[1][::-1], shapes[0][::-1])
        wanted = dict(
            zip(keys(path, embedding=module.is_embedding and not twin), shapes, strict=True)
        )
        wrong = [f"missing: {name}" for name in wanted if name not in names]
        wrong += [f"unexpected: {name}" for name in sorted(names - set(wanted))]
        for name in sorted(names & set(wanted)):
            info, who = self.tensors.infos[name], f"the model and a rank of {rank} need"
            wrong += misfits(name, info, wanted[name], who)
        self.wrong += wrong
        if not wrong:
            a, b = map(self._read, wanted)
            a, b = (b.T, a.T) if twin else (a, b)
            found[module] = Pair(path, *module.to_ours(a, b), self.scaling.scale_of(path))

    def _read(self, name: str) -> np.ndarray:
        tensor = self.tensors.read(name)
        if has_nan(tensor):
            warnings.warn(f"{name} contains NaN", stacklevel=5)
        return np.array(tensor, np.float32 if tensor.dtype == np.float64 else tensor.dtype)

    def _check_other(self, name: str, every: set[str]) -> None:
        """Check a tensor that belongs to no pair: an unchanged copy of the base's is ignored, anything else is rejected."""
        path, _, kind = name.removeprefix(START).rpartition(".")
        if "lora_magnitude_vector" in name:
            self.wrong.append(f"{name}: magnitudes, as in DoRA, are not supported")
        elif path.endswith(".base_layer"):
            if not self._is_of_base(name, f"{path.removesuffix('.base_layer')}.{kind}"):
                self.wrong.append(
                    f"{name}: a {kind} that differs from the model's is not supported"
                )
        elif self.whole.takes(name):
            return
        elif kind == "bias":
            self.wrong.append(
                f"{name}: a trained bias is not supported, only pairs and whole modules are"
            )
        elif self.modules.canonical(path) in every:
            self.wrong.append(
                f"{name}: a whole trained weight that modules_to_save does not name is not supported"
            )
        else:
            self.wrong.append(f"unexpected: {name}")

    def _is_of_base(self, name: str, original: str) -> bool:
        slot = self.modules.slot_of(original)
        if slot is None:
            return False
        ours = stored_array(slot, self.values, self.modules.axes)
        return same_numbers(self.tensors.read(name), ours)

    def _check_twins(self, heads: Mapping[Module, Pair]) -> None:
        """Check that a head which is the transposed embedding has the same pair as the embedding, or that neither has one."""
        for head, module in self.modules.twins.items():
            pair, twin = self.pairs.get(module), heads.get(module)
            if pair is None and twin is None:
                continue
            if (
                pair is None
                or twin is None
                or pair.scale != twin.scale
                or not np.array_equal(pair.a, twin.a)
                or not np.array_equal(pair.b[0], twin.b[0])
            ):
                self.wrong.append(
                    f"{head} and {module.name} are one weight in this model, but the adapter changes them "
                    "differently; PEFT's ensure_weight_tying=True avoids this"
                )
