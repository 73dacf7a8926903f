"""What the weights of a model are called in transformers."""

import re
from collections.abc import Iterable, Mapping

from effscale.interop.describe import describe
from effscale.interop.plan import parameters, plan
from effscale.models import Transformer
from effscale.quant.places import places

Names = Mapping[str, tuple[str, ...]]
"""By our name of a kernel or table, the names of its module in transformers: in files, and in memory where that is another."""


def module_names(model: Transformer) -> Names:
    """The modules of transformers that hold each kernel and table.

    Raises:
        ValueError: The model is of no family that transformers has.

    Example:
        >>> from effscale.models import abstract, bert
        >>> config = bert(num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=64, max_length=16)
        >>> module_names(abstract(config))["layers.1.feed_forward.up.kernel"]
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
    """Our names of the weights in whose module's name a regular expression is found; a lone asterisk finds all.

    Raises:
        ValueError: It is no regular expression, or finds nothing; the error begins with ``where``.
    """
    if pattern == "*":
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}={pattern!r} is not a regular expression: {error}") from None
    found = [ours for ours, modules in names.items() if any(map(expression.search, modules))]
    if not found:
        like = ", ".join(modules[0] for modules in list(names.values())[:6])
        raise ValueError(f"{where}={pattern!r} is found in no module's name; they are like {like}")
    return found


def expression_of(chosen: Iterable[str], names: Iterable[str]) -> str:
    r"""A regular expression that is found in exactly the chosen ones of our names.

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
