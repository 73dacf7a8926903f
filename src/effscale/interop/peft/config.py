"""``adapter_config.json``: the supported kinds of adapter, and the ranks and scales of pairs."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from effscale.interop.foreign import Fields, shown
from effscale.interop.patterns import matcher
from effscale.interop.tensors import FolderError

# Fields that, when set, make the adapter something other than x W + s (x A) B.
OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "a mixture by Arrow routing",
    "layer_replication": "a model with repeated layers",
    "target_parameters": "pairs of parameters outside linear layers",
    "trainable_token_indices": "trained rows of an embedding",
}
# Initializations that subtract the pair from the base weight, so that the pair belongs to another base.
CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Ranks and scales: for all modules, and for those that a pattern names.

    Attributes:
        rank: Rank of a pair.
        alpha: The scale is ``alpha / rank`` or, with ``root``, ``alpha / sqrt(rank)`` (rank-stabilized LoRA).
        root: Whether to divide by the square root of the rank.
        ranks: Other ranks, by a module's path or a regular expression that matches its end
            (``effscale.interop.patterns``).
        alphas: Other alphas, in the same form.
    """

    rank: int
    alpha: int | float
    root: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """Return the rank of a module's pair."""
        return _lookup(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        """Return the scale of a module's pair."""
        return _lookup(self.alphas, name, self.alpha) / _divisor(self.rank_of(name), self.root)


def other_kind(fields: Mapping[str, Any]) -> list[str]:
    """Return the reasons why the adapter has more than plain LoRA pairs."""
    wrong = []
    if fields.get("peft_type") != "LORA":
        wrong.append(f"peft_type={shown(fields.get('peft_type'))}: only LORA is supported")
    for name, kind in OTHER_KINDS.items():
        if fields.get(name):
            wrong.append(f"{name}={shown(fields[name])}: not supported ({kind})")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
        wrong.append(
            f"init_lora_weights={start!r}: such an adapter belongs to a base with changed weights; in PEFT, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) converts it to a plain one"
        )
    return wrong


def read_scaling(fields: Mapping[str, Any]) -> Scaling:
    """Read ranks and scales from the fields of the file.

    Raises:
        FolderError: A field is invalid.
    """
    given = Fields("adapter_config.json", {"r": 8, "lora_alpha": 8, **fields})
    return Scaling(
        rank=given.whole("r", least=1),
        alpha=given.number("lora_alpha"),
        root=given.flag("use_rslora", False),
        ranks=_patterns(given, "rank_pattern", functools.partial(Fields.whole, least=1)),
        alphas=_patterns(given, "alpha_pattern", Fields.number),
    )


def write_scaling(pairs: Sequence[tuple[str, int, float]]) -> dict[str, Any]:
    """Return the fields that describe the ranks and scales of modules' pairs, given as (name, rank, scale).

    The most common rank and alpha become the general ones, and the patterns list the others. If only division by the square
    root of the rank gives whole alphas, that is used.
    """
    plain, rooted = (
        [_alpha(scale, _divisor(rank, root)) for _, rank, scale in pairs] for root in (False, True)
    )
    whole = lambda alphas: all(isinstance(alpha, int) for alpha in alphas)
    root = whole(rooted) and not whole(plain)
    alphas = dict(zip([name for name, _, _ in pairs], rooted if root else plain, strict=True))
    ranks = {name: rank for name, rank, _ in pairs}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": root,
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
    }


def targets(adapted: Iterable[str], every: Iterable[str]) -> list[str]:
    """Return the shortest path endings that match the adapted modules and no others.

    Example:
        >>> targets(["h.0.attn.query", "h.1.attn.query"], ["h.0.attn.query", "h.1.attn.query", "h.0.mlp.up"])
        ['query']
        >>> targets(["h.0.attn.query"], ["h.0.attn.query", "h.1.attn.query"])
        ['0.attn.query']
    """
    adapted = list(adapted)
    count = lambda names: collections.Counter(end for name in names for end in _ends(name))
    ours, all_ = count(adapted), count({*every, *adapted})
    return sorted({next(end for end in _ends(name) if ours[end] == all_[end]) for name in adapted})


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _divisor(rank: int, root: bool) -> int | float:
    return math.sqrt(rank) if root else rank


def _alpha(scale: float, divisor: int | float) -> int | float:
    """Return an alpha that gives the scale when divided: a whole number if possible, otherwise the nearest."""
    near = scale * divisor
    tried = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in tried if alpha / divisor == scale), near)


def _lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    # In the order of the file, as in PEFT: the first match counts.
    return next((v for pattern, v in patterns.items() if matcher(pattern)(name)), default)


def _patterns(given: Fields, key: str, read: Callable[[Fields, str], Any]) -> Mapping[str, Any]:
    """Return the values of a pattern field, after compiling each pattern."""
    block = given.block(key, Fields(key, {}))
    for pattern in block.values:
        try:
            matcher(pattern)
        except ValueError as error:
            raise FolderError(
                f"adapter_config.json: {key} has the pattern {shown(pattern)}, which is not a supported regular "
                f"expression: {error}. Name the modules instead"
            ) from error
    return {pattern: read(block, pattern) for pattern in block.values}


def _most_common(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]
