"""The weights of a model by name, and the rule that applies to each."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

from flax import nnx

from effscale.models import Transformer, map_weights, split_groups
from effscale.models.name_patterns import name_search

Model = TypeVar("Model", bound=nnx.Module)


@runtime_checkable
class Named(Protocol):
    """A rule for the weights whose name matches an expression."""

    @property
    def where(self) -> str:
        """A regular expression to search in a weight's name."""
        ...


AnyRule = TypeVar("AnyRule", bound=Named)


class Place(NamedTuple):
    """A weight's name for rules, its path in the model, and the first layer of the repetition it belongs to (None outside layers)."""

    name: str
    path: str
    unit: int | None


def places(model: nnx.Module) -> list[Place]:
    """Return every kernel and table of a model; a stacked one appears once for each of its layers."""
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    paths = [path for path in paths if path.endswith(("kernel", "embedding"))]
    if not isinstance(model, Transformer):
        return [Place(path, path, None) for path in paths]
    found = [Place(path, path, None) for path in paths if not path.startswith("groups.")]
    unit = 0
    for number, group in enumerate(model.config.groups):
        for _ in range(group.repeat):
            for block in range(len(group.blocks)):
                begin = f"groups.{number}.blocks.{block}."
                for path in paths:
                    if path.startswith(begin):
                        name = f"layers.{unit + block}.{path.removeprefix(begin)}"
                        found.append(Place(name, path, unit))
            unit += len(group.blocks)
    return found


def decisions(found: list[Place], rules: Sequence[AnyRule]) -> dict[str, AnyRule]:
    """Map the name of each weight that a rule matches to the first such rule; raises if a rule is left without a weight."""
    names = [place.name for place in found]
    decided: dict[str, AnyRule] = {}
    for rule in rules:
        chosen = name_search(rule.where, names, option="where")
        new = [name for name in names if chosen(name) and name not in decided]
        if not new:
            raise ValueError(
                f"where={rule.where!r} has no weight left: earlier rules match all the weights that it matches"
            )
        decided |= dict.fromkeys(new, rule)
    return decided


def map_by_rules(
    model: Model,
    rules: Sequence[AnyRule],
    convert: Callable[[Any, AnyRule, list[str]], Any],
    *,
    kind: Callable[[AnyRule | None], Hashable],
) -> Model:
    """Return the model with its weights converted by the rules that apply to them.

    Args:
        model: Any ``nnx`` module.
        rules: The rules, in order of precedence.
        convert: ``convert(weight, rule, names)``, with the names of the weight in its layers, returns the
            replacement. A ``ValueError`` from it is raised again, prefixed with the first name.
        kind: The property of a rule that splits stacks: layers of a stack with rules of different kinds become
            separate groups.
    """
    found = places(model)
    decided = decisions(found, rules)
    if isinstance(model, Transformer):
        model = cast("Any", split_groups)(model, _begins(found, decided, kind))
    # The layers of a stack now have the same rule.
    stacks: dict[str, list[str]] = {}
    for place in places(model):
        stacks.setdefault(place.path, []).append(place.name)
    for path, names in stacks.items():
        rule = decided.get(names[0])
        if rule is None:
            continue

        def one(weight: Any, names: list[str] = names, rule: AnyRule = rule) -> Any:
            try:
                return convert(weight, rule, names)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from error

        model = map_weights(model, one, lambda path, wanted=path: path == wanted)
    return model


def _begins(
    found: list[Place], decided: Mapping[str, AnyRule], kind: Callable[[AnyRule | None], Hashable]
) -> list[int]:
    """Return the layers whose kind of rule differs from that of the layer before them in the same stack."""
    last: dict[str, Hashable] = {}
    begins = set()
    for place in found:
        if place.unit is not None:
            own = kind(decided.get(place.name))
            if last.get(place.path, own) != own:
                begins.add(place.unit)
            last[place.path] = own
    return sorted(begins)
