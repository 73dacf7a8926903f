"""Read DeepSpeed's ``compression_training`` into a quantization recipe, pruning rules and a list of layers to keep."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effscale.interop.deepspeed.blocks import BLOCK, ModuleGroup, enabled, groups_of
from effscale.interop.deepspeed.module_names import Names, expression_of, module_names, search
from effscale.interop.deepspeed.settings import (
    Block,
    check_keys,
    flag,
    named,
    number,
    one_of,
    strings,
    whole_number,
    whole_numbers,
)
from effscale.models import Transformer, take_layers
from effscale.quant.bit_schedules import BitSchedule
from effscale.quant.formats import Format
from effscale.quant.pruning.masks import Method, Pruning, Structure
from effscale.quant.pruning.rules import PruneRule, merge_masks, prune_model
from effscale.quant.pruning.shrink import shrink_model
from effscale.quant.recipes import Recipe, Rule, fake_quantize_model, quantize_model

QUANTIZATION = ("weight_quantization", "activation_quantization")
PRUNING: Mapping[str, Structure] = {
    "sparse_pruning": "sparse",
    "row_pruning": "row",
    "head_pruning": "head",
}
TECHNIQUES = ("layer_reduction", *QUANTIZATION, *PRUNING, "channel_pruning")
OFFSET = 1000
"""DeepSpeed's default ``schedule_offset`` for everything except weight quantization, in its code; its documentation
differs."""

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
        >>> from effscale.models import abstract, bert
        >>> config = bert(num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=64, max_length=16)
        >>> found = compression_from_deepspeed({"compression_training": {"row_pruning": {
        ...     "shared_parameters": {"enabled": True},
        ...     "different_groups": {"rp1": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate.dense"],
        ...         "related_modules": [["layer.\\w+.output.dense"]]}}}}}, abstract(config))
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
    check_keys(config, "the configuration", required=(BLOCK,), optional=config)
    block = config[BLOCK]
    check_keys(block, BLOCK, optional=TECHNIQUES)
    if enabled(block, "channel_pruning"):
        raise ValueError(
            f"{BLOCK}.channel_pruning is not supported: it prunes convolutions, which no model here has. Remove it"
        )
    layers = _teacher_layers(block)
    student = model
    if layers is not None and model.config.num_layers != len(layers):
        student = take_layers(model, layers)
    names = module_names(student)
    rules, shrink = _pruning(block, names)
    return DeepSpeedCompression(
        teacher_layers=layers, pruning=rules, recipe=_recipe(block, names), shrink=shrink
    )


def _teacher_layers(block: Block) -> tuple[int, ...] | None:
    if not enabled(block, "layer_reduction"):
        return None
    own, where = block["layer_reduction"], f"{BLOCK}.layer_reduction"
    optional = ("keep_number_layer", "module_name_prefix", "other_module_name")
    check_keys(own, where, required=("enabled", "teacher_layer"), optional=optional)
    layers = whole_numbers(own["teacher_layer"], f"{where}.teacher_layer")
    if "keep_number_layer" in own:
        count = whole_number(own["keep_number_layer"], f"{where}.keep_number_layer")
        if count != len(layers):
            raise ValueError(
                f"{where}.keep_number_layer must be the number of layers in teacher_layer, {len(layers)}, got {count}"
            )
    return layers


def _recipe(block: Block, names: Names) -> Recipe | None:
    """Build the recipe, with one rule for all weights that get the same formats."""
    weights = _weights(block, names) if enabled(block, QUANTIZATION[0]) else {}
    inputs = _inputs(block, names) if enabled(block, QUANTIZATION[1]) else {}
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
    technique = QUANTIZATION[0]
    shared, where = block[technique]["shared_parameters"], f"{BLOCK}.{technique}.shared_parameters"
    known = (
        "enabled",
        "quantizer_kernel",
        "schedule_offset",
        "quantize_groups",
        "quantize_verbose",
        "quantization_type",
        "rounding",
        "quantize_weight_in_forward",
        "fp16_mixed_quantize",
    )
    check_keys(shared, where, optional=known)
    if one_of(shared, "rounding", ("nearest", "stochastic"), where) == "stochastic":
        raise ValueError(f"{where}.rounding must be 'nearest', got 'stochastic'")
    in_forward = flag(shared, "quantize_weight_in_forward", where)
    offset = whole_number(shared.get("schedule_offset", 0), f"{where}.schedule_offset")
    blocks = whole_number(shared.get("quantize_groups", 1), f"{where}.quantize_groups")
    symmetric = _is_symmetric(shared, where)
    ratio = None
    mixed, mixed_where = shared.get("fp16_mixed_quantize", {}), f"{where}.fp16_mixed_quantize"
    check_keys(mixed, mixed_where, optional=("enabled", "quantize_change_ratio"))
    if flag(mixed, "enabled", mixed_where) and not in_forward:
        ratio = number(mixed, "quantize_change_ratio", 0.001, mixed_where)
    found = {}
    params = {"start_bits": True, "target_bits": True, "quantization_period": False}
    for group in groups_of(block, technique, names, **params):
        count = lambda key, default=None, group=group: whole_number(
            group.params.get(key, default), f"{group.where}.params.{key}"
        )
        start, target = count("start_bits"), count("target_bits")
        period = count("quantization_period", 1)
        with_place = f"{group.where}.params: "
        schedule = named(
            with_place,
            BitSchedule,
            start_bits=target if in_forward else start,
            target_bits=target,
            period=period,
            offset=offset,
            change_ratio=ratio,
        )
        common = {"bits": target, "symmetric": symmetric, "spread": "paper"}
        table = named(with_place, Format, granularity="channel", **common)
        several = {"granularity": "block", "num_blocks": blocks}
        one = {"granularity": "tensor"}
        kernel = named(with_place, Format, **common, **(one if blocks == 1 else several))
        for name in group.names:
            format = table if name.endswith("embedding") else kernel
            found[name] = format, schedule if schedule.end > 0 else None
    return found


def _inputs(block: Block, names: Names) -> dict[str, tuple[Format, int]]:
    technique = QUANTIZATION[1]
    shared, where = block[technique]["shared_parameters"], f"{BLOCK}.{technique}.shared_parameters"
    known = ("enabled", "quantization_type", "range_calibration", "schedule_offset")
    check_keys(shared, where, optional=known)
    if one_of(shared, "range_calibration", ("dynamic", "static"), where) == "static":
        raise ValueError(
            f"{where}.range_calibration must be 'dynamic', got 'static': ranges are not averaged during training. For static ranges, "
            "calibrate the trained model with quantize_model(..., ranges=input_ranges(...))"
        )
    offset = whole_number(shared.get("schedule_offset", OFFSET), f"{where}.schedule_offset")
    symmetric, found = _is_symmetric(shared, where), {}
    for group in groups_of(block, technique, _kernels(names), bits=True):
        bits = whole_number(group.params["bits"], f"{group.where}.params.bits")
        if bits not in (4, 8):
            raise ValueError(f"{group.where}.params.bits must be 4 or 8, got {bits}")
        format = Format(bits=bits, symmetric=symmetric, granularity="token", spread="paper")
        found |= dict.fromkeys(group.names, (format, offset))
    return found


def _pruning(block: Block, names: Names) -> tuple[tuple[PruneRule, ...], bool]:
    """Return the rules of all structures, and whether pruned parts are removed."""
    rules: list[PruneRule] = []
    shrink = False
    for technique, structure in PRUNING.items():
        if not enabled(block, technique):
            continue
        shared = block[technique]["shared_parameters"]
        where = f"{BLOCK}.{technique}.shared_parameters"
        if structure == "sparse" and shared.get("method") == "snip_momentum":
            raise ValueError(
                f"{where}.method must be 'l1' or 'topk', got 'snip_momentum', which does not run in DeepSpeed as written either"
            )
        heads = ("num_heads",) if structure == "head" else ()
        check_keys(shared, where, required=heads, optional=("enabled", "method", "schedule_offset"))
        methods = ("topk", "l1") if heads else ("l1", "topk")
        method: Method = one_of(shared, "method", methods, where)
        offset = whole_number(shared.get("schedule_offset", OFFSET), f"{where}.schedule_offset")
        num_heads = whole_number(shared["num_heads"], f"{where}.num_heads") if heads else None
        own = names if structure == "sparse" else _kernels(names)
        for group in groups_of(block, technique, own, dense_ratio=True):
            pruning = named(
                f"{group.where}.params: ",
                Pruning,
                structure=structure,
                dense_ratio=number(group.params, "dense_ratio", None, f"{group.where}.params"),
                method=method,
                num_heads=num_heads,
                offset=offset,
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
        for pattern in strings(patterns, where)
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


def _is_symmetric(shared: Block, where: str) -> bool:
    """Return whether ``quantization_type`` is symmetric, which is the default."""
    return one_of(shared, "quantization_type", ("symmetric", "asymmetric"), where) == "symmetric"
