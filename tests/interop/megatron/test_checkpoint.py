"""GPTs with experts of Megatron-DeepSpeed: the same logits as a GPT in PyTorch, whatever the layers, and back."""

import argparse
import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.interop import FolderError, load_megatron_moe, save_megatron_moe
from effscale.interop.describe import essence
from effscale.models import MLPConfig, abstract_model, gpt2
from effscale.moe import MoEConfig, RouterConfig, with_experts
from tests.interop.files import bits_of, model_of_numbers

torch = pytest.importorskip("torch", reason="DeepSpeed's files are PyTorch's")
from tests.moe import deepspeed_oracle as oracle  # noqa: E402

ARGS = {
    "num_layers": 4,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_channels": 6,
    "ffn_hidden_size": 16,
    "padded_vocab_size": 20,
    "max_position_embeddings": 8,
    "layernorm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_gelu_fusion": True,
    "normalization": "layernorm",
    "untie_embeddings_and_output_weights": False,
    "num_experts": [3],
    "expert_interval": 2,
    "topk": 1,
    "mlp_type": "standard",
    "moe_token_dropping": False,
    "moe_loss_coeff": 0.01,
}
VARIANTS = {
    "standard": ([1, 3, 1, 3], {}),
    "residual pyramid of two choices": (
        [1, 2, 1, 4],
        {"num_experts": [2, 4], "topk": 2, "mlp_type": "residual"},
    ),
    "every layer, the last one dense": (
        [2, 2, 2, 1],
        {"num_experts": [2, 2, 2, 1], "expert_interval": 1},
    ),
}
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def made(counts, **args):
    k, residual = args.get("topk", 1), args.get("mlp_type") == "residual"
    return oracle.random_weights(oracle.Gpt(counts, k=k, residual=residual))


@pytest.fixture
def folder(tmp_path):
    oracle.save_megatron(made([1, 3, 1, 3]), tmp_path, **ARGS)
    return tmp_path


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(request, tmp_path_factory):
    """A checkpoint, the GPT that it is of, and the model that it becomes here."""
    counts, args = VARIANTS[request.param]
    theirs, place = made(counts, **args), tmp_path_factory.mktemp("theirs")
    oracle.save_megatron(theirs, place, **(ARGS | args))
    return place, theirs, load_megatron_moe(place)


def test_the_logits_are_those_of_the_gpt(loaded):
    _, theirs, ours = loaded
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS))
    logits = jax.jit(lambda m, ids: m(ids))(ours, jnp.asarray(IDS))
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_model_comes_back_with_the_files_of_megatron(loaded, tmp_path):
    place, _, model = loaded
    save_megatron_moe(model, tmp_path)
    back = load_megatron_moe(tmp_path)
    assert bits_of(back) == bits_of(model)
    assert essence(back.config) == essence(model.config)
    for path in place.iterdir():
        with torch.serialization.safe_globals([argparse.Namespace]):
            ours = torch.load(tmp_path / path.name)
        if path.name.startswith("layer"):
            theirs = torch.load(path)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
        else:
            theirs = torch.load(path, weights_only=False)
            assert ours["num_experts"] == theirs["num_experts"]
            ours, theirs = (states["module"]["language_model"] for states in (ours, theirs))
            assert ours["embedding"].keys() == theirs["embedding"].keys()
            assert ours["encoder"].keys() == theirs["encoder"].keys()


@pytest.mark.parametrize(("version", "axes"), [(0, (1, 0, 2)), (1.0, (0, 2, 1))])
def test_queries_keys_and_values_of_old_versions(folder, tmp_path, version, axes):
    new = load_megatron_moe(folder)
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    encoder = states["module"]["language_model"]["encoder"]
    for name, weight in encoder.items():
        if "query_key_value" in name:
            rest = weight.shape[1:]
            parts = weight.view(2, 3, 6, *rest)  # heads, then queries, keys and values
            parts = parts.permute(*axes, *range(3, parts.ndim))
            encoder[name] = parts.reshape(weight.shape).contiguous()
    torch.save(states | {"checkpoint_version": version}, path)
    assert bits_of(load_megatron_moe(folder)) == bits_of(new)


def test_objects_of_other_classes_are_passed_by(folder, monkeypatch):
    class LossScaler:
        def __init__(self):
            self.cur_scale = 1.0

    module = types.ModuleType("deepspeed.runtime.fp16.loss_scaler")
    LossScaler.__module__, LossScaler.__qualname__ = module.__name__, "LossScaler"
    module.LossScaler = LossScaler
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    with monkeypatch.context() as patch:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(states | {"optimizer": {"loss_scaler": LossScaler()}}, path)
    assert load_megatron_moe(folder).config.num_layers == 4
    assert "deepspeed" not in sys.modules


def test_a_config_stands_in_for_the_arguments(folder):
    model = load_megatron_moe(folder)
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    del states["args"]
    torch.save(states, path)
    with pytest.raises(FolderError, match=r"has no args, which describe the model. Pass its"):
        load_megatron_moe(folder)
    given = load_megatron_moe(folder, model.config, dtype="bfloat16")
    assert given.embed.tokens.embedding.get_value().dtype == jnp.bfloat16
    narrow = dataclasses.replace(model.config, d_model=8)
    with pytest.raises(FolderError, match="wrong shape: "):
        load_megatron_moe(folder, narrow)
    torch.save({n: v for n, v in states.items() if n != "checkpoint_version"}, path)
    with pytest.raises(FolderError, match="has no checkpoint_version"):
        load_megatron_moe(folder, model.config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"use_rotary_position_embeddings": True},
            "must have use_rotary_position_embeddings=False, .*, got True",
        ),
        ({"normalization": "rmsnorm"}, "must have normalization='layernorm', .*, got 'rmsnorm'"),
        ({"num_key_value_heads": 1}, "must have num_key_value_heads=2, got 1"),
        ({"num_layers": 10**9}, "must have num_layers of at most 70, .*, got 1000000000"),
        ({"num_layers": "four"}, "num_layers must be a whole number.*, got 'four'"),
        ({"num_experts": [10**9]}, "1000000000 experts in each of 2 layers"),
        ({"num_experts": [3, 3, 3]}, "one number, or one for each of 2 layers"),
        ({"num_experts": [3, 5]}, r"missing: .*layers\.3.*deepspeed_experts\.3"),
        ({"topk": 4}, "k must be at most num_experts.*got 4"),
        ({"mlp_type": "other"}, "mlp_type standard or residual, got 'other'"),
        ({"checkpoint_version": 0.5}, "checkpoint_version must be 0, 1, or at least 2, got 0.5"),
    ],
)
def test_arguments_that_cannot_be_are_refused(folder, args, message):
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    states |= {n: args.pop(n) for n in list(args) if n == "checkpoint_version"}
    torch.save(states | {"args": argparse.Namespace(**(ARGS | args))}, path)
    with pytest.raises(FolderError, match=message):
        load_megatron_moe(folder)


def here(**changes):
    given = {"num_layers": 2, "d_model": 8, "num_heads": 2, "vocab_size": 11, "max_length": 4}
    dense = gpt2(**given)
    moe = MoEConfig(num_experts=2, expert=dense.blocks[0].feed_forward)
    return with_experts(dense, dataclasses.replace(moe, **changes))


def test_a_model_that_was_made_here(tmp_path):
    router = RouterConfig(k=2, capacity_factor=1.25, eval_capacity_factor=2.0, noise="jitter")
    model = model_of_numbers(here(router=router))
    save_megatron_moe(model, tmp_path)
    back = load_megatron_moe(tmp_path)
    assert bits_of(back) == bits_of(model)
    assert back.config.layers[1].feed_forward.router.eval_capacity_factor == 2.0
    assert back.config.layers[1].feed_forward.router.capacity_factor == 1.25


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: here(mix="sum", shared=MLPConfig(d_ff=32)),
            "mix must be 'weighted', got 'sum'",
        ),
        (lambda: here(expert=MLPConfig(d_ff=4)), "feed_forward.d_ff must be 4, got 32"),
        (
            lambda: here(router=RouterConfig(score="sigmoid")),
            "score must be 'softmax', got 'sigmoid'",
        ),
        (lambda: gpt2(num_layers=1, d_model=8, num_heads=2), "the config has no experts"),
    ],
)
def test_what_megatron_does_not_have_is_refused(tmp_path, config, message):
    model = abstract_model(config())
    with pytest.raises(
        ValueError, match=f"Megatron-DeepSpeed does not support this model.*{message}"
    ):
        save_megatron_moe(model, tmp_path)
