"""Read DeepSpeed's ``compression_training`` into a quantization recipe, pruning rules and a list of layers to keep."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from effscale.interop.deepspeed.module_names import Names, expression_of, module_names, search
from effscale.interop.deepspeed.settings import (
    IGNORED,
    SWITCH,
    Block,
    Key,
    Table,
    is_enabled,
    named,
    read,
)
from effscale.models import Transformer, take_layers
from effscale.options import NonNegativeInt, PositiveInt
from effscale.quant.bit_schedules import BitSchedule
from effscale.quant.formats import Format
from effscale.quant.pruning.masks import Pruning
from effscale.quant.pruning.rules import PruneRule, merge_masks, prune_model
from effscale.quant.pruning.shrink import shrink_model
from effscale.quant.recipes import Recipe, Rule, fake_quantize_model, quantize_model

BLOCK = "compression_training"
OFF = Key(bool, False)
SYMMETRIC = Key(Literal["symmetric", "asymmetric"], "symmetric")
# DeepSpeed's default of everything except weight quantization, in its code; its documentation differs.
OFFSET = Key(NonNegativeInt, 1000)


class Technique(NamedTuple):
    """The tables of a technique: of its ``shared_parameters``, and of the ``params`` of a group."""

    shared: Table
    params: Table


def _pruning(method: Any, default: str, advice: str = "", **more: Key) -> Technique:
    shared = {"enabled": OFF, "method": Key(method, default, advice), "schedule_offset": OFFSET}
    return Technique(shared | more, {"dense_ratio": Key(float)})


SNIP = "DeepSpeed's 'snip_momentum' does not run there as written either"
TECHNIQUES: Mapping[str, Technique] = {
    "weight_quantization": Technique(
        {
            "enabled": OFF,
            "quantizer_kernel": IGNORED,
            "schedule_offset": Key(NonNegativeInt, 0),
            "quantize_groups": Key(PositiveInt, 1),
            "quantize_verbose": IGNORED,
            "quantization_type": SYMMETRIC,
            "rounding": Key(Literal["nearest"], "nearest"),
            "quantize_weight_in_forward": OFF,
            "fp16_mixed_quantize": Key(
                {"enabled": OFF, "quantize_change_ratio": Key(float, 0.001)}, {}
            ),
        },
        {
            "start_bits": Key(int),
            "target_bits": Key(int),
            "quantization_period": Key(int, 1),
        },
    ),
    "activation_quantization": Technique(
        {
            "enabled": OFF,
            "quantization_type": SYMMETRIC,
            "range_calibration": Key(
                Literal["dynamic"],
                "dynamic",
                "Ranges are not averaged during training. For static ranges, calibrate the trained model with "
                "quantize_model(..., ranges=input_ranges(...))",
            ),
            "schedule_offset": OFFSET,
        },
        {"bits": Key(Literal[4, 8])},
    ),
    "sparse_pruning": _pruning(Literal["l1", "topk"], "l1", SNIP),
    "row_pruning": _pruning(Literal["l1", "topk"], "l1"),
    "head_pruning": _pruning(Literal["topk", "l1"], "topk", num_heads=Key(int)),
}
LAYER_REDUCTION = {
    "enabled": SWITCH,
    "teacher_layer": Key(tuple[int, ...]),
    "keep_number_layer": Key(int, None),
    "module_name_prefix": IGNORED,
    "other_module_name": IGNORED,
}
WHOLE: Table = dict.fromkeys(("layer_reduction", *TECHNIQUES, "channel_pruning"), IGNORED)
GROUP = {"params": Key(Any), "modules": Key(Any, "*"), "related_modules": Key(Any, None)}

PARTNERS = {
    "feed_forward.up": ("feed_forward.down",),
    "feed_forward.gate": ("feed_forward.down",),
    "attention.out": ("attention.query", "attention.key", "attention.value"),
}
"""Kernels whose rows or heads can be removed, and the kernels that shrink along with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeedCompression:
    """What a DeepSpeed configuration requests.

    Attributes:
        teacher_layers: Layers to pass to ``effscale.models.take_layers``; None keeps all.
        pruning: Rules for ``prune_model``.
        recipe: Recipe for ``fake_quantize_model`` and ``quantize_model``; None quantizes nothing.
        shrink: Whether pruned rows and heads are removed at the end; ``related_modules`` requests this.
    """

    teacher_layers: tuple[int, ...] | None = None
    pruning: tuple[PruneRule, ...] = ()
    recipe: Recipe | None = None
    shrink: bool = False

    def prepare(self, model: Transformer) -> Transformer:
        """Return the model to train with ``scheduled_step``; DeepSpeed's ``init_compression``."""
        if self.teacher_layers is not None:
            model = take_layers(model, self.teacher_layers)
        if self.pruning:
            model = prune_model(model, self.pruning)
        return model if self.recipe is None else fake_quantize_model(model, self.recipe)

    def finish(self, model: Transformer) -> Transformer:
        """Return the trained model, shrunk and packed. DeepSpeed's ``redundancy_clean`` leaves weights in floats."""
        if self.pruning:
            model = shrink_model(model) if self.shrink else merge_masks(model)
        return model if self.recipe is None else quantize_model(model, self.recipe)


def compression_from_deepspeed(config: Block, model: Transformer) -> DeepSpeedCompression:
    r"""Read ``compression_training`` from a DeepSpeed configuration.

    The expressions in ``modules`` are searched in the names that the model's modules have in transformers, as in
    DeepSpeed. Options have the defaults of DeepSpeed's code, which are not always those of its documentation.
    Differences from DeepSpeed:

    - ``quantize_groups`` are blocks of outputs. Where transformers has query, key and value in one matrix, each of
      the three matrices here gets that number of blocks.
    - ``fp16_mixed_quantize`` and decreasing bits (with ``quantize_weight_in_forward`` false) work in every dtype and
      follow each weight's own schedule. With ``quantize_weight_in_forward`` true, weights use ``target_bits`` from
      the start and ``start_bits`` is ignored, as in DeepSpeed.
    - Masks are applied before rounding, magnitude masks are computed at their offset, and scores start as magnitudes;
      see ``prune_weight``.
    - A pattern that matches nothing is an error; DeepSpeed ignores it. If ``modules`` is missing or ``"*"``, it means
      all.
    - Ignored, because they only concern DeepSpeed's implementation: ``quantizer_kernel``, ``quantize_verbose``,
      ``module_name_prefix`` and ``other_module_name``.

    Not supported, with an error that names the key: ``snip_momentum``, channel pruning (for convolutions), static
    calibration during training, stochastic rounding of weights, quantized inputs where the weights are not quantized,
    and the older ``quantize_training``, which DeepSpeed itself ignores.

    Args:
        config: The whole configuration, as returned by ``json.load``.
        model: A model of one of the families of ``effscale.interop``. With ``layer_reduction`` it is the teacher that
            layers are taken from.

    Returns:
        What the configuration requests; empty if nothing is enabled.

    Raises:
        ValueError: A key is unknown or missing, a value is out of range, or the configuration requests something
            unsupported.

    Example:
        >>> from effscale.models import abstract_model, bert
        >>> config = bert(num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=64, max_length=16)
        >>> found = compression_from_deepspeed({"compression_training": {"row_pruning": {
        ...     "shared_parameters": {"enabled": True},
        ...     "different_groups": {"rp1": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate.dense"],
        ...         "related_modules": [["layer.\\w+.output.dense"]]}}}}}, abstract_model(config))
        >>> found.pruning[0].pruning.offset, found.pruning[0].where, found.shrink
        (1000, '^(layers\\.\\d+\\.feed_forward\\.up\\.kernel)$', True)

    References:
        DeepSpeed, "DeepSpeed Configuration JSON", section Compression.
            https://www.deepspeed.ai/docs/config-json/#compression
    """
    if "quantize_training" in config:
        raise ValueError(
            f"quantize_training is not supported, and DeepSpeed ignores it. Use {BLOCK}.weight_quantization"
        )
    block = read(config, "", {BLOCK: Key(WHOLE)}, others=True)[BLOCK]
    if _enabled(block, "channel_pruning"):
        raise ValueError(
            f"{BLOCK}.channel_pruning is not supported: it prunes convolutions, which no model here has. Remove it"
        )
    layers = _teacher_layers(block)
    student = model
    if layers is not None and model.config.num_layers != len(layers):
        student = take_layers(model, layers)
    names = module_names(student)
    rules, shrink = _prune_rules(block, names)
    return DeepSpeedCompression(
        teacher_layers=layers, pruning=rules, recipe=_recipe(block, names), shrink=shrink
    )


class ModuleGroup(NamedTuple):
    """A group of a technique: its place in the configuration, its parameters, and effscale's names of the weights it
    applies to.
    """

    where: str
    params: Block
    related: Any
    names: list[str]


def _enabled(block: Block, technique: str) -> bool:
    """Return whether a technique is present and enabled. The default is off, as in DeepSpeed."""
    given, where = block[technique], f"{BLOCK}.{technique}"
    if given is None:
        return False
    if technique != "layer_reduction":
        own = {"shared_parameters": Key(Any), "different_groups": IGNORED}
        given = read(given, where, own)["shared_parameters"]
        where = f"{where}.shared_parameters"
    return is_enabled(given, where, False)


def _shared(block: Block, technique: str) -> dict[str, Any] | None:
    """Return the ``shared_parameters`` of a technique, or None if it is off."""
    if not _enabled(block, technique):
        return None
    where = f"{BLOCK}.{technique}.shared_parameters"
    return read(block[technique]["shared_parameters"], where, TECHNIQUES[technique].shared)


def _groups(block: Block, technique: str, names: Names) -> list[ModuleGroup]:
    """Return the groups of a technique, each with those of the named weights that it applies to."""
    where = f"{BLOCK}.{technique}.different_groups"
    given = block[technique].get("different_groups")
    if not given:
        raise ValueError(f"{where} must name at least one group, because {technique} is enabled")
    groups: list[ModuleGroup] = []
    for name, group in read(given, where, dict.fromkeys(given, Key(GROUP))).items():
        place = f"{where}.{name}"
        params = read(group["params"], f"{place}.params", TECHNIQUES[technique].params)
        patterns = _strings(group["modules"], f"{place}.modules")
        found = {n: None for p in patterns for n in search(p, names, f"{place}.modules")}
        for other in groups:
            if both := [n for n in found if n in other.names]:
                raise ValueError(
                    f"{place}.modules and {other.where}.modules both match {names[both[0]][0]}. Make the patterns disjoint"
                )
        groups.append(ModuleGroup(place, params, group["related_modules"], list(found)))
    return groups


def _strings(value: Any, where: str) -> list[str]:
    """Return a list of expressions; a single string counts as a list of one."""
    values = [value] if isinstance(value, str) else value
    is_list = isinstance(values, list | tuple) and all(isinstance(one, str) for one in values)
    if not is_list or not values:
        raise ValueError(f"{where} must be a list of expressions, got {value!r}")
    return list(values)


def _teacher_layers(block: Block) -> tuple[int, ...] | None:
    if not _enabled(block, "layer_reduction"):
        return None
    where = f"{BLOCK}.layer_reduction"
    own = read(block["layer_reduction"], where, LAYER_REDUCTION)
    layers, count = own["teacher_layer"], own["keep_number_layer"]
    if count not in (None, len(layers)):
        raise ValueError(
            f"{where}.keep_number_layer must be the number of layers in teacher_layer, {len(layers)}, got {count}"
        )
    return layers


def _recipe(block: Block, names: Names) -> Recipe | None:
    """Build the recipe, with one rule for all weights that get the same formats."""
    weights, inputs = _weights(block, names), _inputs(block, names)
    if missing := [name for name in inputs if name not in weights]:
        raise ValueError(
            f"{BLOCK}.activation_quantization matches {names[missing[0]][0]}, whose weights weight_quantization does not quantize. "
            "Inputs can be quantized only together with the weights"
        )
    alike: dict[Any, list[str]] = {}
    for name, (format, schedule) in weights.items():
        alike.setdefault((format, schedule, *inputs.get(name, (None, 0))), []).append(name)
    rules = tuple(
        Rule(
            where=expression_of(chosen, names),
            weights=format,
            schedule=schedule,
            activations=activations,
            activations_offset=offset,
        )
        for (format, schedule, activations, offset), chosen in alike.items()
    )
    return Recipe(rules) if rules else None


def _weights(block: Block, names: Names) -> dict[str, tuple[Format, BitSchedule | None]]:
    shared = _shared(block, "weight_quantization")
    if shared is None:
        return {}
    in_forward, blocks = shared["quantize_weight_in_forward"], shared["quantize_groups"]
    mixed = shared["fp16_mixed_quantize"]
    one_kernel = {"granularity": "block", "num_blocks": blocks}
    if blocks == 1:
        one_kernel = {"granularity": "tensor"}
    found = {}
    for group in _groups(block, "weight_quantization", names):
        where, target = f"{group.where}.params", group.params["target_bits"]
        schedule = named(
            where,
            BitSchedule,
            start_bits=target if in_forward else group.params["start_bits"],
            target_bits=target,
            period=group.params["quantization_period"],
            offset=shared["schedule_offset"],
            change_ratio=mixed["quantize_change_ratio"]
            if mixed["enabled"] and not in_forward
            else None,
        )
        common = {"bits": target, "symmetric": _is_symmetric(shared), "spread": "paper"}
        table = named(where, Format, granularity="channel", **common)
        kernel = named(where, Format, **common, **one_kernel)
        for name in group.names:
            format = table if name.endswith("embedding") else kernel
            found[name] = format, schedule if schedule.end > 0 else None
    return found


def _inputs(block: Block, names: Names) -> dict[str, tuple[Format, int]]:
    shared, found = _shared(block, "activation_quantization"), {}
    if shared is None:
        return {}
    for group in _groups(block, "activation_quantization", _kernels(names)):
        symmetric = _is_symmetric(shared)
        bits = group.params["bits"]
        format = Format(bits=bits, symmetric=symmetric, granularity="token", spread="paper")
        found |= dict.fromkeys(group.names, (format, shared["schedule_offset"]))
    return found


def _prune_rules(block: Block, names: Names) -> tuple[tuple[PruneRule, ...], bool]:
    """Return the rules of all structures, and whether pruned parts are removed."""
    rules: list[PruneRule] = []
    shrink = False
    for structure in ("sparse", "row", "head"):
        technique = f"{structure}_pruning"
        if (shared := _shared(block, technique)) is None:
            continue
        own = names if structure == "sparse" else _kernels(names)
        for group in _groups(block, technique, own):
            pruning = named(
                f"{group.where}.params",
                Pruning,
                structure=structure,
                dense_ratio=group.params["dense_ratio"],
                method=shared["method"],
                num_heads=shared.get("num_heads"),
                offset=shared["schedule_offset"],
            )
            rules.append(PruneRule(where=expression_of(group.names, names), pruning=pruning))
            if group.related is not None and structure != "sparse":
                _check_related(group, names)
                shrink = True
    return tuple(rules), shrink


def _check_related(group: ModuleGroup, names: Names) -> None:
    """Raise unless ``related_modules`` are those that shrink along with the modules of the group."""
    where = f"{group.where}.related_modules"
    lists = group.related if isinstance(group.related, list | tuple) else [group.related]
    related = {
        name
        for patterns in lists
        for pattern in _strings(patterns, where)
        for name in search(pattern, names, where)
    }
    partners = set()
    for name in group.names:
        layer = name.split(".")[:2]
        part = name.removeprefix(".".join(layer) + ".").removesuffix(".kernel")
        if part not in PARTNERS:
            raise ValueError(
                f"{where}: nothing can be removed from {names[name][0]}. Only the feed-forward's first projection and "
                "attention's output projection can shrink"
            )
        partners |= {".".join([*layer, partner, "kernel"]) for partner in PARTNERS[part]}
    if related != partners:
        wrong = sorted(related ^ partners)[0]
        more = "does not shrink with" if wrong in related else "also shrinks with"
        raise ValueError(f"{where}: {names[wrong][0]} {more} the modules of the group")


def _kernels(names: Names) -> Names:
    return {name: modules for name, modules in names.items() if name.endswith("kernel")}


def _is_symmetric(shared: Block) -> bool:
    return shared["quantization_type"] == "symmetric"
