"""The weights of a model by name, and the rule that applies to each."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

from flax import nnx

from effscale.models import Transformer, map_weights, split_groups
from effscale.models.name_patterns import BY_NAME, name_search

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
    """A weight, or one layer of a stack of weights.

    Attributes:
        name: Its name for rules.
        path: Its path in the model.
        unit: The first layer of the repetition it belongs to; None outside layers.
        word: A word that the expression of a rule must contain to select it, as for routers; None for most weights.
    """

    name: str
    path: str
    unit: int | None
    word: str | None


def places(model: nnx.Module) -> list[Place]:
    """Return every kernel and table of a model; a stacked one appears once for each of its layers."""
    words = {
        ".".join(map(str, path)): variable.get_metadata().get(BY_NAME)
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if str(path[-1]).endswith(("kernel", "embedding"))
    }
    if not isinstance(model, Transformer):
        return [Place(path, path, None, word) for path, word in words.items()]
    outside = {path: word for path, word in words.items() if not path.startswith("groups.")}
    found = [Place(path, path, None, word) for path, word in outside.items()]
    unit = 0
    for number, group in enumerate(model.config.groups):
        for _ in range(group.repeat):
            for block in range(len(group.blocks)):
                begin = f"groups.{number}.blocks.{block}."
                for path, word in words.items():
                    if path.startswith(begin):
                        name = f"layers.{unit + block}.{path.removeprefix(begin)}"
                        found.append(Place(name, path, unit, word))
            unit += len(group.blocks)
    return found


def decisions(found: list[Place], rules: Sequence[AnyRule]) -> dict[str, AnyRule]:
    """Map the name of each weight that a rule selects to the first such rule; raises if a rule is left without a weight."""
    names = [place.name for place in found]
    words = {place.name: place.word for place in found}
    decided: dict[str, AnyRule] = {}
    for rule in rules:
        chosen = name_search(rule.where, names, option="where")
        matched = [name for name in names if chosen(name) and name not in decided]
        new = [name for name in matched if (words[name] or "") in rule.where]
        if not new and matched:
            raise ValueError(
                f"where={rule.where!r} must contain {words[matched[0]]!r} to select {matched[0]}, which stays in float unless named"
            )
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
