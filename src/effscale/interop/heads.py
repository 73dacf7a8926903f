"""Heads other than those of a folder: what they use of its tensors, and what is initialized."""

import dataclasses
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from effscale.interop.plan import parameters
from effscale.interop.source import Source
from effscale.interop.table import Rule
from effscale.models import ClassHead, Dense, LMHead, TransformerConfig
from effscale.models.config import HeadConfig
from effscale.parallel import shardings

REWARDS = ("score", "classes", "value")
"""Names of the same head with one output: a score of a text, and DeepSpeed-Chat's value of its tokens."""


def with_heads(
    source: Source, heads: Sequence[HeadConfig] | None, initialize: Collection[str] = ()
) -> Source:
    """Return the source for a model with other heads.

    Tensors of heads that were not requested are left out. ``fresh`` of the new source names the parameters for which the
    folder has no tensor.

    Args:
        source: The folder.
        heads: The heads; None: those of the folder.
        initialize: Names of heads that use nothing from the folder.

    Raises:
        ValueError: The model does not support a head, or the folder has the head in another form; one error lists all
            problems.
    """
    chosen = source.config.heads if heads is None else tuple(heads)
    unknown = set(initialize) - {head.name for head in chosen}
    if unknown:
        raise ValueError(
            f"initialize must name heads of the model, which are {[head.name for head in chosen]}, got {sorted(initialize)}"
        )
    _check_kinds(source, chosen)
    pooler = _has_pooler(source, chosen)
    config = dataclasses.replace(source.config, heads=chosen, pooler=pooler)
    rules = [rule for rule in source.rules if not _of_head(rule)]
    taken: set[str] = set()
    fresh: set[str] = set()
    wrong: list[str] = []
    if pooler and not source.config.pooler:
        fresh |= {"pooler.kernel", "pooler.bias"}
    for head in chosen:
        leaves = _leaves(head, config)
        theirs = None if head.name in initialize else _counterpart(head, source)
        if theirs is None:
            fresh |= leaves
            continue
        rows = [_moved(rule, theirs, head.name) for rule in source.rules if _of_head(rule, theirs)]
        wrong += _differences(head, theirs, rows, leaves, source)
        rules += [row for row in rows if row.ours in leaves]
        taken |= {row.theirs for row in rows}
    if wrong:
        raise ValueError(
            f"the heads cannot be loaded from {str(source.path)!r}:\n  " + "\n  ".join(wrong)
        )
    unwanted = {rule.theirs for rule in source.rules if _of_head(rule)} - taken
    if not pooler:
        unwanted |= {rule.theirs for rule in rules if rule.parts[0].startswith("pooler.")}
    return dataclasses.replace(
        source,
        config=config,
        rules=tuple(rules),
        names=source.names - unwanted,
        fresh=frozenset(fresh),
    )


def initial_values(
    source: Source, key: PRNGKeyArray | None, dtype: np.dtype, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Return values of the parameters for which the folder has no tensor, by path.

    The values of a head depend only on the key and its name, not on other heads.

    Raises:
        ValueError: There are such parameters but no key.
    """
    if not source.fresh:
        return {}
    config = source.config
    if key is None:
        names = sorted({_owner(leaf) for leaf in source.fresh})
        raise ValueError(
            f"{str(source.path)!r}: has no tensors for {', '.join(names)}. Pass a key to initialize them, such as "
            "key=jax.random.key(0)"
        )
    width = config.hidden_width
    modules: dict[str, Any] = {
        "pooler": lambda rngs: Dense(
            width, width, std=config.init_std, axes=("embed", None), rngs=rngs
        )
    }
    for head in config.heads:
        modules[f"heads.{head.name}"] = lambda rngs, head=head: head.build(config, rngs=rngs)
    found: dict[str, jax.Array] = {}
    for name, build in modules.items():
        if not any(leaf.startswith(f"{name}.") for leaf in source.fresh):
            continue
        module = build(nnx.Rngs(jax.random.fold_in(key, zlib.crc32(name.encode()))))
        for path, variable in parameters(module).items():
            value = variable.get_value().astype(dtype)
            if mesh is not None:
                place = shardings(variable.replace(value), mesh).get_value()
                whole = np.asarray(value)
                value = jax.make_array_from_callback(
                    whole.shape, place, lambda index, whole=whole: whole[index]
                )
            found[f"{name}.{path}"] = value
    return found


def _check_kinds(source: Source, heads: Sequence[HeadConfig]) -> None:
    """Raise if the family does not support the kind of a head."""
    family = source.family
    has_pooler = any(rule.parts[0].startswith("pooler.") for rule in family.trunk)
    for head in heads:
        if isinstance(head, ClassHead) and head.pool == "pooled" and not has_pooler:
            raise ValueError(
                f"the head {head.name!r} has pool='pooled', but the family {family.model_type} has no pooler. Use pool='last' "
                "for the last token of a text"
            )
        if isinstance(head, LMHead) and head.name == "lm" and not source.config.causal:
            known = sorted({rule.parts[0].split(".")[1] for rule in family.heads})
            raise ValueError(
                f"the family {family.model_type} has no head that predicts the next token, because a position also attends to later "
                f"ones. Its heads are {', '.join(known)}"
            )


def _has_pooler(source: Source, heads: Sequence[HeadConfig]) -> bool:
    """Return whether the model has a pooler: a head reads it, or there are no heads and the folder has one."""
    pooled = any(isinstance(head, ClassHead) and head.pool == "pooled" for head in heads)
    return pooled or (source.config.pooler and not heads)


def _counterpart(head: HeadConfig, source: Source) -> str | None:
    """Return the name of the folder's head that corresponds to this one, or None."""
    held = [theirs for theirs in source.config.heads if _is_there(theirs, source)]
    for theirs in held:
        if theirs.name == head.name:
            return head.name
    for theirs in held:
        if isinstance(head, ClassHead) and isinstance(theirs, ClassHead):
            names = {head.name, theirs.name}
            one = head.num_classes == theirs.num_classes == 1
            if names <= set(REWARDS[:2]) or (names <= set(REWARDS) and one):
                return theirs.name
    # A tensor may be stored next to those of the heads that identify the folder.
    rest = {rule.theirs for rule in source.rules if _of_head(rule, head.name)} & source.names
    claimed = {
        rule.theirs for theirs in held for rule in source.rules if _of_head(rule, theirs.name)
    }
    return head.name if rest - claimed else None


def _is_there(head: HeadConfig, source: Source) -> bool:
    tied = isinstance(head, LMHead) and head.tied
    return tied or any(r.theirs in source.names for r in source.rules if _of_head(r, head.name))


def _differences(
    head: HeadConfig, name: str, rows: Sequence[Rule], leaves: set[str], source: Source
) -> list[str]:
    """Return what prevents a head from being filled with the tensors of the folder's head."""
    again = f"initialize=({head.name!r},) initializes it"
    theirs = next((one for one in source.config.heads if one.name == name), None)
    match head, theirs:
        case ClassHead(num_classes=ours), ClassHead(num_classes=count) if ours != count:
            return [
                f"{head.name!r} has num_classes={ours}, but the folder's {name!r} has {count}; {again}"
            ]
        case LMHead(tied=ours), LMHead(tied=tied) if ours != tied:
            kind = "the transposed embedding" if tied else "a separate matrix"
            return [f"{head.name!r} has tied={ours}, but the folder's {name!r} is {kind}; {again}"]
    held = {row.theirs for row in rows} & source.names
    wanted = {row.theirs for row in rows if row.ours in leaves}
    hint = lambda tensor, has: f" (bias={has})" if tensor.endswith(".bias") else ""
    lacks = [f"{t}, which the folder lacks{hint(t, False)}" for t in sorted(wanted - held)]
    lacks += [
        f"{leaf}, which the folder's lacks" for leaf in sorted(leaves - {r.ours for r in rows})
    ]
    said = [f"{head.name!r} needs {what}; {again}" for what in lacks]
    said += [
        f"{head.name!r} has no place for {tensor} of the folder{hint(tensor, True)}; {again}"
        for tensor in sorted(held - wanted)
    ]
    return said


def _leaves(head: HeadConfig, config: TransformerConfig) -> set[str]:
    """Return the paths of a head's parameters in the model."""
    module = nnx.eval_shape(lambda: head.build(config, rngs=nnx.Rngs(0)))
    return {f"heads.{head.name}.{path}" for path in parameters(module)}


def _of_head(rule: Rule, name: str | None = None) -> bool:
    return rule.parts[0].startswith("heads." if name is None else f"heads.{name}.")


def _moved(rule: Rule, old: str, new: str) -> Rule:
    """Return the row of a head, for a head with another name."""
    (part,) = rule.parts
    return dataclasses.replace(rule, ours=f"heads.{new}.{part.removeprefix(f'heads.{old}.')}")


def _owner(leaf: str) -> str:
    kind, name, *_ = leaf.split(".")
    return f"the head {name!r}" if kind == "heads" else "the pooler"
