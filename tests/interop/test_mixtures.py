"""Families with experts, from and to transformers: what of a router is the model's, and what is training's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.interop import FolderError, load_pretrained, save_pretrained
from effscale.interop.describe import describe
from effscale.interop.source import open_source
from effscale.interop.summary import summarize
from effscale.models import MLPConfig, aux_loss, llama
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import MeshConfig
from tests.interop.files import bits_of, bytes_of, model_of_numbers, read_folder, write_folder
from tests.interop.spaces import example

TEXT = {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 12, "vocab_size": 31}
DROPLESS = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)


def made_here(router=DROPLESS, **options):
    """A Llama with experts in every layer, as one makes it with `with_experts`."""
    dense = llama(**TEXT)
    expert = dense.blocks[0].feed_forward
    moe = MoEConfig(num_experts=3, expert=expert, router=router, **options)
    return with_experts(dense, moe, every=1)


def routed(**router):
    return made_here(dataclasses.replace(DROPLESS, **router))


TRAINING = {
    "a capacity": lambda: routed(capacity_factor=1.25, min_capacity=8),
    "noise": lambda: routed(noise="gumbel_second"),
    "losses": lambda: routed(balance=0.3, balance_choices="first", z_loss=0.001),
    "who comes first": lambda: routed(priority="random"),
    "how it is computed": lambda: made_here(dispatch="table", groups=1),
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_for_training_alone_does_not_keep_a_model_from_being_saved(name, tmp_path):
    model = model_of_numbers(TRAINING[name]())
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    back = load_pretrained(tmp_path)
    assert bits_of(back) == bits_of(model)
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    run = jax.jit(lambda model, ids: model(ids))
    np.testing.assert_allclose(run(back, ids), run(model, ids), atol=1e-5)


REFUSED = {
    "a capacity outside training": (
        lambda: routed(eval_capacity_factor=1.0),
        r"router\.eval_capacity_factor is 1\.0, and mixtral has None",
    ),
    "sigmoids": (
        lambda: routed(score="sigmoid"),
        r"score is 'sigmoid', and mixtral has 'softmax'",
    ),
    "a scale": (lambda: routed(scale=2.5), r"scale is 2\.5, and mixtral has 1\.0"),
    "a bias of the choice": (lambda: routed(balance_by_bias=True), "balance_by_bias is True"),
    "weights as they are": (
        lambda: routed(normalize="none"),
        "qk_norm is None, and qwen3_moe has 'NormConfig'",
    ),
    "a residual": (
        lambda: made_here(shared=MLPConfig(d_ff=12, activation="silu", gated=True, bias=False)),
        "mix is 'weighted', and qwen2_moe has 'gated'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_does_not_have(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        describe(make())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_loss_of_the_load_is_transformers_s(k, tmp_path):
    """Of one layer; theirs is of all layers' tokens together."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    pytest.importorskip("transformers", reason="the oracle is transformers")
    from tests.interop.torch_models import torch_model

    options = {"num_hidden_layers": 1, "num_experts_per_tok": k, "router_aux_loss_coef": 0.02}
    theirs = torch_model(example("mixtral", "MixtralForCausalLM", **options, pad_token_id=1))
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(2, 31, (2, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        out = theirs(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask),
            output_router_logits=True,
        )
    encoded = jax.jit(lambda m, x, mask: m.encode(x, attention_mask=mask))(model, ids, mask)
    np.testing.assert_allclose(aux_loss(encoded.reports), 0.02 * out.aux_loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        (("qwen2_moe", "Qwen2MoeForCausalLM"), {"mlp_only_layers": [0, 1]}),
        (("qwen2_moe", "Qwen2MoeForCausalLM"), {"num_experts": 0}),
        (("qwen3_moe", "Qwen3MoeForCausalLM"), {"mlp_only_layers": [0, 1]}),
        (
            ("mixtral", "MixtralForCausalLM"),
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                },
                "head_dim": 4,
            },
        ),
    ],
    ids=["Qwen2 without experts", "Qwen2 with none", "Qwen3 without experts", "Mixtral with YaRN"],
)
def test_a_folder_goes_back_as_its_family(case, fields, tmp_path):
    """Even without experts; transformers does not derive the head width that YaRN needs."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    from tests.interop.torch_models import torch_model

    theirs = torch_model(example(*case, **fields, pad_token_id=1))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours", like=tmp_path / "theirs")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **eager)
    assert type(back) is type(theirs)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_the_coefficient_comes_back_for_any_number_of_layers():
    for layers in (1, 2, 3, 7, 12, 24, 39):
        for k, coefficient in ((1, 0.001), (2, 0.01), (3, 0.02), (8, 1e-4)):
            fields = {"num_hidden_layers": layers, "num_experts_per_tok": k, "num_local_experts": 8}
            case = example(
                "mixtral", "MixtralForCausalLM", **fields, router_aux_loss_coef=coefficient
            )
            assert describe(case.config)[1]["router_aux_loss_coef"] == coefficient


def folder_of(case, folder):
    """A folder of a case, with tensors of ones."""
    save_pretrained(model_of_numbers(case.config), folder)
    return read_folder(folder)


def test_experts_are_bounded_by_the_tensors(tmp_path):
    case = example("mixtral", "MixtralForCausalLM")
    tensors = folder_of(case, tmp_path / "made")
    write_folder(tmp_path / "more", tensors, case.json | {"num_local_experts": 2_000_000_000})
    with pytest.raises(
        FolderError, match=r"2000000000 experts in each of 2 layers are more than the"
    ):
        open_source(tmp_path / "more")


def test_an_expert_that_is_missing_and_one_that_is_there_twice(tmp_path):
    case = example("mixtral", "MixtralForCausalLM")
    tensors = folder_of(case, tmp_path / "made")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    fewer = {other: array for other, array in tensors.items() if other != name}
    with pytest.raises(FolderError, match=r"missing: layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        load_pretrained(write_folder(tmp_path / "fewer", fewer, case.json))
    fused = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((3, 24, 8), np.float32)}
    with pytest.raises(
        FolderError, match=r"contains .*experts\.0\.w1\.weight', which also exists separately"
    ):
        load_pretrained(write_folder(tmp_path / "twice", tensors | fused, case.json))


def test_experts_are_divided_while_they_are_loaded(tmp_path):
    """The tensor of an expert goes to the devices that hold it, and from there back into a file."""
    case = example("mixtral", "MixtralForCausalLM", num_local_experts=4)
    tensors = folder_of(case, tmp_path / "made")
    mesh = MeshConfig(data=2, expert=2, fsdp=2).build()
    model = load_pretrained(tmp_path / "made", mesh=mesh)
    up = model.groups[0].blocks[0].feed_forward.experts.up.kernel.get_value()
    assert up.sharding.shard_shape(up.shape) == (2, 4 // 2, 8 // 2, 12)
    assert bits_of(model) == bits_of(load_pretrained(tmp_path / "made"))
    save_pretrained(model, tmp_path / "back")
    assert bytes_of(read_folder(tmp_path / "back")) == bytes_of(tensors)


def test_a_summary_tells_of_experts(tmp_path):
    folder_of(example("mixtral", "MixtralForCausalLM"), tmp_path)
    assert summarize(tmp_path)["feed-forward"] == "3 experts of 12, 2 per token"
