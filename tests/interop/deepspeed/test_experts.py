"""DeepSpeed's files of experts: read as its engine saves them, written as it loads them, refused where they are not whole."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from effscale.interop import (
    FolderError,
    read_deepspeed_experts,
    read_deepspeed_rest,
    write_deepspeed_experts,
)
from effscale.interop.deepspeed.expert_files import DeepSpeedMoE
from effscale.interop.folder import open_tensors
from effscale.interop.tensors import Tensors
from effscale.models import MLPConfig
from effscale.models.context import build_context
from effscale.moe import MoEConfig, RouterConfig

torch = pytest.importorskip("torch", reason="DeepSpeed's files are PyTorch's")
from tests.moe import deepspeed_oracle as oracle  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    oracle.save(oracle.net(), tmp_path, ep_size=2)
    return tmp_path


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_experts_are_stacked_by_their_numbers_in_the_layer(tmp_path, ep_size):
    model = oracle.net()
    oracle.save(model, tmp_path, ep_size)
    experts, rest = read_deepspeed_experts(tmp_path), read_deepspeed_rest(tmp_path)
    assert list(experts) == ["first", "second.0"]
    for prefix, count in {"first": 4, "second.0": 12}.items():
        layer = model.get_submodule(prefix).deepspeed_moe.experts.deepspeed_experts
        for name, array in experts[prefix].items():
            assert len(array) == count
            for expert in range(count):
                assert np.array_equal(array[expert], layer[expert].state_dict()[name])
    assert rest.keys() == oracle.rest_of(model).keys()
    assert all(np.array_equal(rest[name], w) for name, w in oracle.rest_of(model).items())


def our_layer(prefix, experts, rest, *, k, residual):
    """DeepSpeed's layer as ours, as a user puts it together."""
    mlp = MLPConfig(d_ff=oracle.D_FF, activation="gelu_bloom")
    router = RouterConfig(k=k, capacity_factor=None, eval_capacity_factor=None)
    count = len(rest[f"{prefix}.deepspeed_moe.gate.wg.weight"])
    shared = mlp if residual else None
    config = MoEConfig(num_experts=count, expert=mlp, router=router, shared=shared)
    layer = jax.jit(lambda: config.build(oracle.D, std=0.1, out_std=0.1, rngs=nnx.Rngs(0)))()

    def fill(dense, weight, bias=None):
        dense.kernel.set_value(jnp.asarray(np.swapaxes(weight, -1, -2)))
        if bias is not None:
            dense.bias.set_value(jnp.asarray(bias))

    fill(layer.router.logits, rest[f"{prefix}.deepspeed_moe.gate.wg.weight"])
    of = lambda arrays, name: (arrays[f"{name}.weight"], arrays[f"{name}.bias"])
    for ours, theirs in {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}.items():
        fill(getattr(layer.experts, ours), *of(experts[prefix], theirs))
        if residual:
            fill(getattr(layer.shared, ours), *of(rest, f"{prefix}.mlp.{theirs}"))
    if residual:
        fill(layer.coefficient, *of(rest, f"{prefix}.coefficient"))
    return layer


@pytest.mark.parametrize(("prefix", "k", "residual"), [("first", 1, True), ("second.0", 2, False)])
def test_the_layer_gives_the_outputs_of_deepspeeds(folder, prefix, k, residual):
    arrays = read_deepspeed_experts(folder), read_deepspeed_rest(folder)
    layer = our_layer(prefix, *arrays, k=k, residual=residual)
    x = np.random.default_rng(0).normal(size=(2, 8, oracle.D)).astype(np.float32)
    context = build_context(8, kind=None, head_dim=4, causal=True)
    y, _ = jax.jit(lambda m, x: m(x, context))(layer, jnp.asarray(x))
    with torch.no_grad():
        expected = oracle.net().get_submodule(prefix)(torch.from_numpy(x))
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_written_is_what_deepspeed_writes(folder, tmp_path, dtype):
    cast = lambda arrays: {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    experts = {prefix: cast(arrays) for prefix, arrays in read_deepspeed_experts(folder).items()}
    rest = cast(read_deepspeed_rest(folder))
    write_deepspeed_experts(tmp_path / "ours", experts, rest)
    theirs = {path.name for path in folder.iterdir() if path.suffix == ".pt"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == theirs
    torch_dtype = getattr(torch, np.dtype(dtype).name)
    for name in theirs:
        ours, original = (
            torch.load(place / name, weights_only=True) for place in (tmp_path / "ours", folder)
        )
        if name.startswith("mp_rank"):
            assert ours["num_experts"] == original["num_experts"]
            ours, original = ours["module"], original["module"]
        assert list(ours) == list(original)
        assert all(torch.equal(ours[n], original[n].to(torch_dtype)) for n in original)
    back = read_deepspeed_experts(tmp_path / "ours")
    for prefix, arrays in experts.items():
        for name, array in arrays.items():
            assert back[prefix][name].tobytes() == np.asarray(array).tobytes()


def test_a_folder_is_a_source_of_tensors(folder):
    tensors = open_tensors(folder)
    assert isinstance(tensors, DeepSpeedMoE)
    assert isinstance(tensors, Tensors)
    state = oracle.net().state_dict()
    assert tensors.infos.keys() == state.keys()
    assert all(np.array_equal(tensors.read(name), weight) for name, weight in state.items())
    with pytest.raises(FolderError, match="no tensor 'third'"):
        tensors.read("third")


def test_the_file_latest_names_the_checkpoint(tmp_path):
    (tmp_path / "global_step7").mkdir()
    oracle.save_experts(oracle.net(), tmp_path / "global_step7")
    (tmp_path / "latest").write_text("global_step7\n")
    assert list(read_deepspeed_experts(tmp_path)) == ["first", "second.0"]
    (tmp_path / "inner").mkdir()
    for way_out in ("../global_step7", os.fspath(tmp_path / "global_step7"), ".."):
        (tmp_path / "inner" / "latest").write_text(way_out)
        with pytest.raises(FolderError, match="no files layer_L_expert_G"):
            read_deepspeed_experts(tmp_path / "inner")
