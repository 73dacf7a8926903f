"""Names of a model's weights in transformers."""

import re
from collections.abc import Iterable, Mapping

from effscale.interop.describe import describe
from effscale.interop.plan import parameters, plan
from effscale.models import Transformer
from effscale.quant.places import places

Names = Mapping[str, tuple[str, ...]]
"""Maps effscale's name of a kernel or table to the names of its module in transformers: the one in files, and the one in memory if it
differs."""


def module_names(model: Transformer) -> Names:
    """Return the transformers modules that hold each kernel and table.

    Raises:
        ValueError: The model belongs to no family that transformers has.

    Example:
        >>> from effscale.models import abstract_model, bert
        >>> config = bert(num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=64, max_length=16)
        >>> module_names(abstract_model(config))["layers.1.feed_forward.up.kernel"]
        ('encoder.layer.1.intermediate.dense',)
    """
    family, _ = describe(model.config)
    ours: dict[str, list[str]] = {}
    for place in places(model):
        ours.setdefault(place.path, []).append(place.name)
    found: dict[str, tuple[str, ...]] = {}
    for slot in plan(family.rules, model.config, parameters(model)):
        stored = family.stored_name(slot, model.config.heads)
        names = (stored, family.memory_name(stored))
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
        for leaf in slot.leaves:
            if leaf in ours:
                found[ours[leaf][slot.index[0] if slot.index else 0]] = modules
    return found


def search(pattern: str, names: Names, where: str) -> list[str]:
    """Return effscale's names of the weights whose module name matches a regular expression; a single asterisk matches all.

    Raises:
        ValueError: The pattern is not a regular expression, or it matches nothing; the error begins with ``where``.
    """
    if pattern == "*":
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{where} must be a regular expression, got {pattern!r}: {error}"
        ) from None
    found = [ours for ours, modules in names.items() if any(map(expression.search, modules))]
    if not found:
        like = ", ".join(modules[0] for modules in list(names.values())[:6])
        raise ValueError(f"{where}={pattern!r} matches no module name; the names look like {like}")
    return found


def expression_of(chosen: Iterable[str], names: Iterable[str]) -> str:
    r"""Return a regular expression that matches exactly the chosen ones of effscale's names.

    Example:
        >>> names = [f"layers.{i}.{part}.kernel" for i in range(3) for part in ("up", "down")]
        >>> expression_of([name for name in names if "up" in name] + ["layers.1.down.kernel"], names)
        '^(layers\\.\\d+\\.up\\.kernel|layers\\.(1)\\.down\\.kernel)$'
    """
    layers = re.compile(r"layers\.(\d+)\.(.*)")

    def by_part(names: Iterable[str]) -> dict[str, list[str]]:
        parts: dict[str, list[str]] = {}
        for name in names:
            match = layers.fullmatch(name)
            number, part = match.groups() if match else ("", name)
            parts.setdefault(part, []).append(number)
        return parts

    every, wanted = by_part(names), []
    for part, numbers in by_part(chosen).items():
        if numbers == [""]:
            wanted.append(re.escape(part))
        else:
            which = r"\d+" if len(numbers) == len(every[part]) else f"({'|'.join(numbers)})"
            wanted.append(rf"layers\.{which}\.{re.escape(part)}")
    return f"^({'|'.join(wanted)})$"
