"""DeepSpeed's compression_training."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from effscale.interop import compression_from_deepspeed
from effscale.models import ClassHead, LMHead, Transformer, abstract_model, bert, gpt2
from effscale.quant import (
    BitSchedule,
    Format,
    PruneRule,
    Pruning,
    at_step,
    dequantize_model,
    shrink_model,
)
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.packed import PackedWeight

CLASSES = (ClassHead(name="classes", num_classes=2, pool="pooled"),)
SIZES = {"num_layers": 3, "d_model": 16, "num_heads": 4, "d_ff": 32, "vocab_size": 32}
BERT = bert(**SIZES, max_length=8, pooler=True, heads=CLASSES)
MODEL = abstract_model(BERT)

# ZeroQuant's W4/8: attention in 8 bits, feed-forward in 4, inputs of attention alone.
ZEROQUANT = {
    "train_batch_size": 32,
    "compression_training": json.loads(r"""{
      "weight_quantization": {
        "shared_parameters": {"enabled": true, "quantizer_kernel": false, "schedule_offset": 0, "quantize_groups": 4,
          "quantize_verbose": false, "quantization_type": "symmetric", "rounding": "nearest",
          "quantize_weight_in_forward": true, "fp16_mixed_quantize": {"enabled": false, "quantize_change_ratio": 0.001}},
        "different_groups": {
          "wq1": {"params": {"start_bits": 8, "target_bits": 8, "quantization_period": 50},
                  "modules": ["attention.self", "attention.output.dense", "word_embeddings"]},
          "wq2": {"params": {"start_bits": 12, "target_bits": 4}, "modules": ["intermediate", "layer.\\w+.output.dense"]}}},
      "activation_quantization": {
        "shared_parameters": {"enabled": true, "quantization_type": "asymmetric", "schedule_offset": 0},
        "different_groups": {"aq1": {"params": {"bits": 8}, "modules": ["attention.self", "attention.output.dense"]}}}}"""),
}


def test_zeroquant_s_configuration():
    found = compression_from_deepspeed(ZEROQUANT, MODEL)
    block = {"granularity": "block", "num_blocks": 4, "spread": "paper"}
    tokens = Format(granularity="token", symmetric=False, spread="paper")
    rules = {rule.where: rule for rule in found.recipe.rules}
    by_part = {
        part: rule
        for where, rule in rules.items()
        for part in ("query", "key", "value", "out", "up", "down", "tokens")
        if rf"\.{part}\." in where or rf"\.{part}\.embedding" in where
    }
    assert len(rules) == 3
    for part in ("query", "key", "value", "out"):
        assert by_part[part].weights == Format(bits=8, **block)
        assert by_part[part].activations == tokens
    for part in ("up", "down"):
        # In the forward pass the target is taken at once, whatever start_bits says.
        assert by_part[part].weights == Format(bits=4, **block)
        assert (by_part[part].activations, by_part[part].schedule) == (None, None)
    # A table has a scale for each row, whatever the groups.
    assert by_part["tokens"].weights == Format(bits=8, spread="paper")
    assert (found.pruning, found.teacher_layers, found.shrink) == ((), None, False)


def training(**techniques):
    return {"compression_training": techniques}


def technique(shared, *, params, modules=None, **more):
    group = {"params": params, **({} if modules is None else {"modules": modules}), **more}
    return {
        "shared_parameters": {"enabled": True, **shared},
        "different_groups": {"g1": group},
    }


def test_the_defaults_are_those_of_the_code():
    """1000 for every offset but that of weights, one group, dynamic ranges, l1 but for heads: not what the documentation says."""
    config = training(
        weight_quantization=technique({}, params={"start_bits": 8, "target_bits": 4}),
        activation_quantization=technique({}, params={"bits": 4}),
        sparse_pruning=technique({}, params={"dense_ratio": 0.5}, modules=["self.query"]),
        row_pruning=technique({}, params={"dense_ratio": 0.5}, modules=["intermediate"]),
        head_pruning=technique(
            {"num_heads": 4}, params={"dense_ratio": 0.5}, modules=["attention.output.dense"]
        ),
        channel_pruning={"shared_parameters": {"enabled": False}},
        layer_reduction={"keep_number_layer": 2},
    )
    found = compression_from_deepspeed(config, MODEL)
    kernels = next(rule for rule in found.recipe.rules if "query" in rule.where)
    # Without modules, everything: tables, pooler and classifier, too.
    assert all(name in kernels.where for name in ("pooler", "classes"))
    assert kernels.weights == Format(bits=4, granularity="tensor", spread="paper")
    assert kernels.schedule == BitSchedule(start_bits=8, target_bits=4)
    assert kernels.activations == Format(bits=4, granularity="token", spread="paper")
    assert kernels.activations_offset == 1000
    assert found.pruning == (
        PruneRule(
            where=r"^(layers\.\d+\.attention\.query\.kernel)$",
            pruning=Pruning(dense_ratio=0.5, offset=1000),
        ),
        PruneRule(
            where=r"^(layers\.\d+\.feed_forward\.up\.kernel)$",
            pruning=Pruning(structure="row", dense_ratio=0.5, offset=1000),
        ),
        PruneRule(
            where=r"^(layers\.\d+\.attention\.out\.kernel)$",
            pruning=Pruning(
                structure="head", dense_ratio=0.5, offset=1000, num_heads=4, method="topk"
            ),
        ),
    )
    assert not found.shrink
    assert compression_from_deepspeed(training(), MODEL).recipe is None


def test_falling_and_mixed_bits():
    shared = {"schedule_offset": 7, "fp16_mixed_quantize": {"enabled": True}}
    params = {"start_bits": 12, "target_bits": 8, "quantization_period": 50}
    config = training(weight_quantization=technique(shared, params=params, modules="intermediate"))
    (rule,) = compression_from_deepspeed(config, MODEL).recipe.rules
    assert rule.schedule == BitSchedule(
        start_bits=12, target_bits=8, period=50, offset=7, change_ratio=0.001
    )


def test_names_of_other_families_and_of_some_layers():
    """One fused matrix there is three here; layers by their number; the head of GPT-2 is its table."""
    model = abstract_model(gpt2(**SIZES, max_length=8))
    assert isinstance(model.config.heads[0], LMHead)
    params = {"start_bits": 8, "target_bits": 8}
    config = training(
        weight_quantization=technique(
            {}, params=params, modules=[r"transformer.h.(0|2).attn.c_attn", "wte"]
        )
    )
    rules = compression_from_deepspeed(config, model).recipe.rules
    wheres = {rule.where for rule in rules}
    parts = "|".join(rf"layers\.(0|2)\.attention\.{p}\.kernel" for p in ("query", "key", "value"))
    assert wheres == {f"^({parts})$", r"^(embed\.tokens\.embedding)$"}


def test_from_the_configuration_to_the_packed_model():
    """Layers taken, rows and heads pruned and taken out, what is left in 8 bits."""
    config = training(
        layer_reduction={
            "enabled": True,
            "keep_number_layer": 2,
            "module_name_prefix": "bert.encoder.layer",
            "teacher_layer": [0, 2],
            "other_module_name": ["bert.pooler", "bert.embeddings", "classifier"],
        },
        weight_quantization=technique(
            {"quantize_weight_in_forward": True},
            params={"start_bits": 8, "target_bits": 8},
            modules=[r"layer.1.attention.self", r"intermediate"],
        ),
        row_pruning=technique(
            {"schedule_offset": 20, "method": "topk"},
            params={"dense_ratio": 0.5},
            modules=["intermediate.dense"],
            related_modules=[[r"layer.\w+.output.dense"]],
        ),
        head_pruning=technique(
            {"schedule_offset": 10, "num_heads": 4},
            params={"dense_ratio": 0.5},
            modules=["attention.output.dense"],
            related_modules=[["self.query", "self.key", "self.value"]],
        ),
    )
    teacher = Transformer(BERT, rngs=nnx.Rngs(0))
    found = compression_from_deepspeed(config, teacher)
    assert (found.teacher_layers, found.shrink) == ((0, 2), True)
    student = found.prepare(teacher)
    kernel = lambda model, group: model.groups[group].blocks[0].attention.query.kernel.get_value()
    assert isinstance(kernel(student, 1), FakeQuantizedWeight)
    with pytest.raises(ValueError, match="not pruned yet"):
        found.finish(student)
    student = at_step(student, 20)
    small = found.finish(student)
    assert [b.attention.num_heads for b in small.config.blocks] == [2, 2]
    assert [b.feed_forward.d_ff for b in small.config.blocks] == [16, 16]
    assert isinstance(kernel(small, 1), PackedWeight)
    np.testing.assert_allclose(
        kernel(small, 1).dense(),
        dequantize_model(shrink_model(student))
        .groups[1]
        .blocks[0]
        .attention.query.kernel.get_value(),
        atol=1e-6,
    )


def changed(path, value):
    """A configuration that has everything, with one entry at a dotted path set, or removed."""
    config = training(
        weight_quantization=technique(
            {}, params={"start_bits": 8, "target_bits": 4}, modules=["intermediate"]
        ),
        activation_quantization=technique({}, params={"bits": 8}, modules=["intermediate"]),
        sparse_pruning=technique({}, params={"dense_ratio": 0.5}, modules=["self.query"]),
        row_pruning=technique(
            {},
            params={"dense_ratio": 0.5},
            modules=["intermediate"],
            related_modules=[[r"layer.\d.output"]],
        ),
        head_pruning=technique(
            {"num_heads": 4}, params={"dense_ratio": 0.5}, modules=["attention.output.dense"]
        ),
        channel_pruning={"shared_parameters": {"enabled": False}},
        layer_reduction={"enabled": True, "keep_number_layer": 1, "teacher_layer": [1]},
    )
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    block = config
    for name in ("compression_training", *parents):
        if not (name == "compression_training" and path == "quantize_training"):
            block = block[name]
    if value is None:
        del block[last]
    else:
        block[last] = value
    return config


WQ, AQ, SP = "weight_quantization", "activation_quantization", "sparse_pruning"
RP, HP, LR = "row_pruning", "head_pruning", "layer_reduction"
SHARED, G1 = "shared_parameters", "different_groups.g1"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantize_training", {}, "quantize_training is not supported"),
        ("weight_quantisation", {}, "unknown key 'weight_quantisation': did you mean"),
        (
            f"{WQ}.{SHARED}.rounding",
            "stochastic",
            r"rounding must be one of 'nearest', got 'stochastic'",
        ),
        (
            f"{WQ}.{SHARED}.quantization_type",
            "sym",
            r"quantization_type must be one of .*, got 'sym'; did you mean",
        ),
        (
            f"{WQ}.{SHARED}.schedule_offset",
            -1,
            r"schedule_offset must be at least 0, got -1",
        ),
        (f"{WQ}.different_groups", {}, "must name at least one group"),
        (f"{WQ}.{G1}.params.target_bits", 5, r"g1\.params: Format\.bits must be .*, got 5"),
        (
            f"{WQ}.{G1}.params.start_bits",
            3,
            r"g1\.params: BitSchedule\.start_bits must be .*, got 3",
        ),
        (f"{WQ}.{G1}.modules", ["intermediat$"], r"g1\.modules='intermediat\$' matches no module"),
        (f"{WQ}.{G1}.modules", ["("], r"g1\.modules must be a regular expression, got '\('"),
        (f"{WQ}.{G1}.modules", 5, r"g1\.modules must be a list of expressions, got 5"),
        (
            f"{WQ}.different_groups.g2",
            {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["dense"]},
            r"g2\.modules and .*g1\.modules both match .*encoder\.layer\.0\.intermediate\.dense",
        ),
        (
            f"{AQ}.{SHARED}.range_calibration",
            "static",
            r"range_calibration must be one of 'dynamic', got 'static'",
        ),
        (f"{AQ}.{G1}.params.bits", 5, r"params\.bits must be one of 4, 8, got 5"),
        (f"{AQ}.{G1}.modules", ["self"], r"activation_quantization matches .*self\.query"),
        (
            f"{SP}.{SHARED}.method",
            "snip_momentum",
            r"method must be one of 'l1', 'topk', got 'snip_momentum'",
        ),
        (
            f"{SP}.{G1}.params.dense_ratio",
            1.5,
            r"params: Pruning\.dense_ratio must be .*, got 1\.5",
        ),
        (
            f"{SP}.{G1}.params.dense_ratio",
            "half",
            r"dense_ratio must be a finite number, got 'half'",
        ),
        (
            f"{RP}.{G1}.related_modules",
            [["self.query"]],
            r"related_modules: .*self\.query does not shrink with",
        ),
        (
            f"{RP}.{G1}.related_modules",
            [[]],
            r"related_modules must be a list of expressions, got \[\]",
        ),
        (f"{RP}.{G1}.modules", ["self.key"], r"related_modules: nothing can be removed from .*key"),
        ("channel_pruning.shared_parameters.enabled", True, "channel_pruning is not supported"),
        (f"{LR}.keep_number_layer", 5, r"keep_number_layer must be .* 1, got 5"),
        (f"{LR}.teacher_layer", [7], r"layers must be between 0 and 2, got \[7\]"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_what_is_refused(path, value, message, unchecked):
    config = changed(path, value)
    if path == f"{LR}.teacher_layer" and value:
        config["compression_training"][LR]["keep_number_layer"] = 1
    with pytest.raises(ValueError, match=message):
        compression_from_deepspeed(config, MODEL)


def test_a_model_of_no_family_has_no_names():
    odd = dataclasses.replace(BERT, causal=True)
    with pytest.raises(ValueError, match="transformers has no family"):
        compression_from_deepspeed(ZEROQUANT, abstract_model(odd))
