"""What cannot be written in compressed-tensors' layout, and folders in it that are not as they should be: the tensor is named."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.interop import FolderError, load_packed, load_pretrained, save_packed, save_pretrained
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.writer import write_tensors
from effscale.models import (
    Transformer,
    add_lora,
    bloom,
    gpt2,
    llama,
    map_weights,
    unmerge_lora,
)
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.quant import Format, pack_weight
from effscale.quant.fake import FakeQuantizedWeight

SIZES = {"num_layers": 1, "d_model": 32, "num_heads": 2, "vocab_size": 48}
GROUPS = Format(bits=4, granularity="group", group_size=16, symmetric=False)
FOURS = Format(bits=4)
TOKENS = Format(granularity="token")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def pack(weight, format, activations, is_table):
    return pack_weight(weight, format, activations=activations, is_table=is_table)


def packed(model, where, format, activations=None, is_table=False):
    return map_weights(model, lambda weight: pack(weight, format, activations, is_table), where)


def made(config):
    return Transformer(config, rngs=nnx.Rngs(0))


def shapes(config, where, *formats):
    """A packed model without arrays: nothing is computed before it is refused."""
    return jax.eval_shape(lambda: packed(made(config), where, *formats))


LLAMA = llama(**SIZES, d_ff=32)


@pytest.fixture(scope="module")
def model():
    return jax.jit(made, static_argnums=0)(LLAMA)


@pytest.fixture(scope="module")
def small(model):
    """Query in W8A8, key in 4 bits with zero points."""
    small = packed(model, r"query\.kernel", Format(), TOKENS)
    return packed(small, r"key\.kernel", GROUPS)


@pytest.fixture
def folder(small, tmp_path):
    save_packed(small, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "format", "options", "what"),
    [
        (r"query\.kernel", Format(bits=1), {}, r"q_proj.weight: .* no format for binary, per channel.*8, 4 or 2 bits.*layout='effscale'"),
        (r"query\.kernel", Format(floating=True), {}, "q_proj.weight: .* no format for float8"),
        (r"query\.kernel", Format(), {"activations": Format(floating=True, granularity="token")}, "q_proj.weight: .* no format for inputs as float8"),
        ("tokens", Format(), {"is_table": True}, "embed_tokens.weight is an embedding table"),
    ],
)  # fmt: skip
def test_what_the_layout_does_not_hold(where, format, options, what, tmp_path):
    options = (options.get("activations"), options.get("is_table", False))
    with pytest.raises(ValueError, match=what):
        save_packed(shapes(LLAMA, where, format, *options), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_fixed_scales_and_zero_points(model, tmp_path):
    small = packed(model, r"query\.kernel", Format(), Format(granularity="tensor"))
    fixed = lambda weight: dataclasses.replace(weight, input_scale=jnp.ones(1))
    with pytest.raises(ValueError, match=r"q_proj\.weight: its inputs have a fixed scale"):
        save_packed(map_weights(small, fixed, r"query\.kernel"), tmp_path)
    no_multiple = packed(model, r"query\.kernel", dataclasses.replace(GROUPS, integer_zero=False))
    with pytest.raises(
        ValueError, match=r"q_proj\.weight: its zero points are not integer multiples"
    ):
        save_packed(no_multiple, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    above = map_weights(model, lambda weight: jnp.abs(weight) + 1, r"query\.kernel")
    with pytest.raises(ValueError, match=r"q_proj\.weight: a zero point does not fit into 4 bits"):
        save_packed(packed(above, r"query\.kernel", GROUPS), tmp_path)


def test_modules_that_are_not_linear_or_of_two_formats(tmp_path):
    """GPT-2 has Conv1D; BLOOM one tensor for query, key and value."""
    model = shapes(gpt2(**SIZES, max_length=8), r"up\.kernel", Format())
    with pytest.raises(
        ValueError, match=r"h\.0\.mlp\.c_fc\.weight is not a torch\.nn\.Linear.*Conv1D"
    ):
        save_packed(model, tmp_path)
    model = shapes(bloom(**SIZES), r"query\.kernel", Format())
    what = r"query_key_value\.weight holds attention\.query\.kernel, .* formats differ"
    with pytest.raises(ValueError, match=what):
        save_packed(model, tmp_path)


@pytest.mark.parametrize(
    ("where", "format", "activations", "what"),
    [
        (r"attention\..*kernel", FOURS, None, r"experts\.0\.\w+\.weight is not packed"),
        (r"experts\..*kernel", Format(), TOKENS, r"experts\.0\.\w+\.weight has quantized inputs.*w4a16\(\)"),
        (r"experts\..*kernel", GROUPS, None, r"experts\.0\.\w+\.weight has zero points"),
        (r"experts\.up\.kernel", FOURS, None, "is not packed"),
        (r"router|experts\..*kernel", FOURS, None, r"gate\.weight is a router"),
    ],
)  # fmt: skip
def test_mixtures_that_transformers_does_not_load(where, format, activations, what, tmp_path):
    """It leaves packed routers random without an error, and merges the experts."""
    router = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)
    experts = MoEConfig(num_experts=2, expert=LLAMA.blocks[0].feed_forward, router=router)
    model = shapes(with_experts(LLAMA, experts, every=1), where, format, activations)
    with pytest.raises(ValueError, match=what):
        save_packed(model, tmp_path)


@pytest.mark.parametrize("scale", [np.inf, np.nan, 0.0, -1.0])
def test_scales_that_no_quantizer_writes(scale, folder):
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.infos}
    name = f"{QUERY}.weight_scale"
    tensors[name][0] = scale
    write_tensors(folder, tensors.items())
    with pytest.raises(FolderError, match=rf"{name} must be finite and positive, got {scale}"):
        load_packed(folder)


def test_models_that_are_not_packed(model, small, tmp_path):
    with pytest.raises(ValueError, match=r"no packed weights\. Pack them with quantize_model"):
        save_packed(model, tmp_path)
    fake = map_weights(small, lambda w: FakeQuantizedWeight(w, Format()), r"value\.kernel")
    with pytest.raises(ValueError, match=r"value\.kernel is fake-quantized"):
        save_packed(fake, tmp_path)
    adapted = add_lora(small, rank=2, key=jax.random.key(0), where=r"query\.kernel")
    with pytest.raises(
        ValueError, match=r"query\.kernel has a LoRA pair\. Save the pair with save_adapter"
    ):
        save_packed(adapted, tmp_path)
    save_packed(unmerge_lora(adapted), tmp_path)
    with pytest.raises(FolderError, match=r"'compressed-tensors'.*effscale\.interop\.load_packed"):
        load_pretrained(tmp_path)
    save_pretrained(model, tmp_path)
    with pytest.raises(
        FolderError, match=r"no quantization_config.*Use effscale\.interop\.load_pretrained"
    ):
        load_packed(tmp_path)


def edit(folder, change):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    change(fields["quantization_config"])
    path.write_text(json.dumps(fields))


def group(number):
    return lambda config: config["config_groups"][f"group_{number}"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c.update(quant_method="gptq"), "'gptq', which is not supported; effscale supports .*pack-quantized.*its own"),
        (lambda c: group(0)(c).update(format="float-quantized"), "'float-quantized' is not supported; effscale supports"),
        (lambda c: group(0)(c)["weights"].update(num_bits=5), "5 bits.* not supported; effscale supports"),
        (lambda c: group(0)(c)["weights"].update(type="float"), "the type 'float' is not supported; effscale supports"),
        (lambda c: group(0)(c)["weights"].update(strategy="block"), "the strategy 'block' is not supported; effscale supports"),
        (lambda c: group(1)(c)["weights"].update(num_bits=2), "symmetric must be True for ternary, got False; effscale"),
        (lambda c: group(1)(c)["weights"].update(group_size="all"), "group_size must be .*, got 'all'"),
        (lambda c: group(0)(c)["input_activations"].update(dynamic=False), "'token' with num_bits=8 and dynamic=False is not supported"),
        (lambda c: group(0)(c).update(output_activations={"num_bits": 8}), "outputs are quantized, which is not supported"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "has kv_cache_scheme, which is not supported"),
        (lambda c: c.update(quantization_status="frozen"), "quantization_status must be 'compressed', got 'frozen'"),
        (lambda c: c["config_groups"].clear(), r"[kq]_proj\.weight is quantized, but no group of .* targets model\.layers\.0"),
        (lambda c: c.update(ignore=["re:.*k_proj"]), r"k_proj\.weight is quantized, but no group"),
        (lambda c: group(0)(c).update(targets=["re:(a+)+"]), r"the target 're:\(a\+\)\+'"),
        (lambda c: group(1)(c)["weights"].update(group_size=12), r"k_proj\.weight: .* 12 does not divide 32 inputs"),
        (lambda c: group(1)(c)["weights"].update(group_size=8), r"k_proj\.weight_scale must be floats \[32, 4\], got float32 \[32, 2\]"),
        (lambda c: group(1)(c)["weights"].update(num_bits=8), r"k_proj\.weight_packed must be int32 \[32, 8\] for 32 x 32 codes of 8 bits, got int32 \[32, 4\]"),
        (lambda c: c.update(config_groups=[]), "config_groups"),
    ],
)  # fmt: skip
def test_configs(folder, change, what):
    edit(folder, change)
    with pytest.raises(FolderError, match=what):
        load_packed(folder)


QUERY, KEY = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{QUERY}.weight_scale"), rf"{QUERY}\.weight_scale is missing: in int-quantized"),
        (lambda t: t.pop(f"{KEY}.weight_scale"), rf"{KEY}\.weight_scale is missing: in pack-quantized"),
        (lambda t: t.pop(f"{KEY}.weight_shape"), rf"{KEY}\.weight_shape is missing"),
        (lambda t: t.pop(f"{KEY}.weight_zero_point"), rf"{KEY}\.weight_zero_point is missing"),
        (lambda t: t.update({f"{KEY}.weight_shape": np.array([2**40, 2**40])}), rf"{KEY}\.weight_packed must be .*, got int32 \[32, 4\]"),
        (lambda t: t.update({f"{KEY}.weight_shape": np.array([32, -1])}), rf"{KEY}\.weight"),
        (lambda t: t.update({f"{KEY}.weight_zero_point": np.zeros((32, 2), np.int32)}), rf"{KEY}\.weight_zero_point must be int32 \[4, 2\].*, got int32 \[32, 2\]"),
        (lambda t: t.update({f"{QUERY}.weight_scale": np.ones((3, 1), np.float32)}), rf"{QUERY}\.weight_scale must be .*, got float32 \[3, 1\]"),
        (lambda t: t.update({f"{QUERY}.weight": np.ones((32, 32), np.int16)}), rf"{QUERY}\.weight must be int8 .*, got int16"),
        (lambda t: t.update({
            f"{QUERY}.weight": np.ones((32, 16), np.int8)}), r"wrong shape: layers\.0\.self_attn\.q_proj\.weight \[32, 16\]"),
        (lambda t: t.update({f"{KEY}.weight_g_idx": np.zeros(32, np.int32)}), r"unexpected: .*k_proj\.weight_g_idx"),
    ],
)  # fmt: skip
def test_tensors(folder, change, what):
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.infos}
    change(tensors)
    write_tensors(folder, tensors.items())
    with pytest.raises(FolderError, match=what):
        load_packed(folder)


def test_damage(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(FolderError, match="is not a valid safetensors file"):
        load_packed(folder)
