"""Loading: errors that list everything, types, meshes, memory, and training on what was loaded."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import effscale.interop.pieces
from effscale.interop import FolderError, load_pretrained, save_pretrained
from effscale.interop.plan import parameters
from effscale.models import abstract_model
from effscale.parallel import MeshConfig, shardings
from tests.interop.files import (
    bits_of,
    bytes_of,
    model_of_numbers,
    read_folder,
    size_of,
    write_folder,
)
from tests.interop.spaces import example

MESHES = [
    MeshConfig(fsdp=8, data=1),
    MeshConfig(fsdp=2, tensor=4, data=1),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=8),
]


@pytest.fixture
def gpt2(tmp_path):
    """A folder, its tensors and its config.json."""
    case = example("gpt2", "GPT2LMHeadModel")
    save_pretrained(model_of_numbers(case.config), tmp_path / "original")
    return tmp_path / "gpt2", read_folder(tmp_path / "original"), case.json


def test_one_error_lists_every_tensor_that_is_wrong(gpt2):
    folder, tensors, fields = gpt2
    del tensors["transformer.ln_f.bias"], tensors["transformer.h.0.mlp.c_fc.weight"]
    tensors |= {
        "transformer.h.2.ln_1.weight": np.ones(8, np.float32),
        "transformer.h.0.attn.rotary": np.ones((2, 3), np.float32),
        "transformer.h.1.attn.c_attn.weight": np.ones((24, 8), np.float32),
        "transformer.wpe.weight": np.ones((31, 8), np.float32),
        "transformer.ln_f.weight": np.ones(8, np.int64),
    }
    write_folder(folder, tensors, fields)
    with pytest.raises(FolderError) as raised:
        load_pretrained(folder)
    first, *listed = str(raised.value).splitlines()
    assert first == (
        f"the tensors in {folder} are not those of the gpt2 that its config.json describes:"
    )
    assert listed == [
        "  missing: h.0.mlp.c_fc.weight [8, 32]",
        "  missing: ln_f.bias [8]",
        "  unexpected: h.0.attn.rotary [2, 3]",
        "  wrong shape: h.1.attn.c_attn.weight [24, 8], but config.json needs [8, 24]",
        "  unexpected: h.2.ln_1.weight [8]",
        "  not of a float type: ln_f.weight int64",
        "  wrong shape: wpe.weight [31, 8], but config.json needs [32, 8]",
    ]


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "wrong"),
    [
        # One row fewer than a number of heads would divide; a vocabulary that was resized; OPT's two rows more.
        ("bloom", "BloomModel", {"n_head": 4, "hidden_size": 12}, "query_key_value.weight [24, 8]"),
        ("opt", "OPTModel", {"vocab_size": 30}, "embed_tokens.weight [31, 8], but config.json needs [30, 8]"),
        ("opt", "OPTModel", {"max_position_embeddings": 30}, "embed_positions.weight [34, 8], but config.json needs [32, 8]"),
        ("llama", "LlamaModel", {"num_key_value_heads": 1}, "k_proj.weight [8, 8], but config.json needs [4, 8]"),
        ("vit", "ViTModel", {"image_size": 6}, "position_embeddings [1, 5, 8], but config.json needs [1, 10, 8]"),
        ("vit", "ViTModel", {"num_channels": 1}, "projection.weight [8, 3, 2, 2], but config.json needs [8, 1, 2, 2]"),
        ("bert", "BertModel", {"num_hidden_layers": 1}, "unexpected: encoder.layer.1.output.dense.weight [8, 12]"),
        ("gpt_neox", "GPTNeoXModel", {"num_hidden_layers": 3}, "missing: layers.2.attention.query_key_value.weight [96, 32]"),
        ("gpt_neox", "GPTNeoXModel", {"attention_bias": False}, "unexpected: layers.0.attention.dense.bias [32]"),
    ],
)  # fmt: skip
def test_a_config_of_another_model(model_type, architecture, fields, wrong, tmp_path):
    case = example(model_type, architecture)
    save_pretrained(model_of_numbers(case.config), tmp_path / "original")
    write_folder(tmp_path / "other", read_folder(tmp_path / "original"), case.json | fields)
    with pytest.raises(FolderError, match=re.escape(wrong)):
        load_pretrained(tmp_path / "other")


def test_a_head_that_is_named_and_not_there(gpt2):
    folder, tensors, fields = gpt2
    write_folder(folder, tensors, fields | {"tie_word_embeddings": False})
    with pytest.raises(FolderError, match=r"missing: lm_head.weight \[31, 8\]"):
        load_pretrained(folder)


def test_an_architecture_that_we_have_not(gpt2):
    folder, tensors, fields = gpt2
    named = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    write_folder(folder, tensors, fields | named)
    with pytest.raises(
        FolderError,
        match=r"config\.json: the architecture must belong to one of gpt2, opt, bloom, gptj, .*, got 'MambaForCausalLM'",
    ):
        load_pretrained(folder)


def test_a_config_that_tells_nothing_but_sizes(gpt2):
    folder, tensors, fields = gpt2
    for name in ("model_type", "architectures"):
        del fields[name]
    model = load_pretrained(write_folder(folder, tensors, fields))
    assert bytes_of(saved(model, folder / "out")) == bytes_of(tensors)


def saved(model, folder):
    save_pretrained(model, folder)
    return read_folder(folder)


def test_numbers_that_are_none_are_loaded_and_named(gpt2, recwarn):
    folder, tensors, fields = gpt2
    for name, value in (("h.1.ln_2.bias", np.nan), ("wpe.weight", np.inf)):
        array = tensors[f"transformer.{name}"].copy()
        array.flat[3] = value
        tensors[f"transformer.{name}"] = array
    for dtype in ("float32", "float16", ml_dtypes.bfloat16):
        cast = {name: array.astype(dtype) for name, array in tensors.items()}
        model = load_pretrained(write_folder(folder, cast, fields))
        said = [str(warning.message) for warning in recwarn]
        assert said == ["h.1.ln_2.bias contains NaN"]
        recwarn.clear()
        assert bytes_of(saved(model, folder / "out")) == bytes_of(cast)


def test_numbers_beyond_a_narrower_type_are_named(gpt2):
    folder, tensors, fields = gpt2
    tensors["transformer.ln_f.bias"] = np.array([7e4] + 7 * [np.inf], np.float32)
    tensors["transformer.ln_f.weight"] = np.full(8, np.inf, np.float32)
    write_folder(folder, tensors, fields)
    with pytest.warns(
        UserWarning, match="ln_f.bias has values beyond the range of float16"
    ) as seen:
        model = load_pretrained(folder, dtype="float16")
    assert len(seen) == 1
    assert np.isinf(model.final_norm.bias.get_value()).all()
    with pytest.warns(UserWarning, match="ln_f.bias has values beyond the range of float16"):
        save_pretrained(load_pretrained(folder), folder / "out", dtype=jnp.float16)


@pytest.mark.parametrize("dtype", ["float64", "int32", "float8_e4m3fn", "double precision", 7])
def test_other_types_of_parameters(gpt2, dtype):
    folder, tensors, fields = gpt2
    write_folder(folder, tensors, fields)
    with pytest.raises(ValueError, match="dtype must be"):
        load_pretrained(folder, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be"):
        save_pretrained(load_pretrained(folder), folder / "out", dtype=dtype)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(ml_dtypes.bfloat16)])
def test_a_type_by_name_or_as_a_type(gpt2, dtype):
    folder, tensors, fields = gpt2
    model = load_pretrained(write_folder(folder, tensors, fields), dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    assert model(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.bfloat16


def test_every_tensor_keeps_its_own_type_and_double_precision_becomes_single(gpt2):
    folder, tensors, fields = gpt2
    half = ml_dtypes.bfloat16
    tensors |= {n: a.astype(half) for n, a in tensors.items() if ".mlp." in n or ".attn." in n}
    wide = tensors["transformer.wpe.weight"].astype(np.float64) * np.pi
    tensors["transformer.wpe.weight"] = wide
    model = load_pretrained(write_folder(folder, tensors, fields))
    assert model.config.dtype == "bfloat16"  # as most numbers are
    tensors["transformer.wpe.weight"] = wide.astype(np.float32)
    assert bytes_of(saved(model, folder / "out")) == bytes_of(tensors)


def test_layers_of_several_types_become_single_precision(gpt2):
    folder, tensors, fields = gpt2
    name = "transformer.h.{}.ln_1.weight"
    tensors[name.format(0)] = tensors[name.format(0)].astype(np.float16)
    tensors[name.format(1)] = tensors[name.format(1)].astype(ml_dtypes.bfloat16)
    model = load_pretrained(write_folder(folder, tensors, fields))
    tensors |= {name.format(i): tensors[name.format(i)].astype(np.float32) for i in range(2)}
    assert bytes_of(saved(model, folder / "out")) == bytes_of(tensors)


def test_loading_twice_gives_the_same_in_other_memory(gpt2):
    folder, tensors, fields = gpt2
    write_folder(folder, tensors, fields)
    one, two = load_pretrained(folder), load_pretrained(folder)
    assert bits_of(one) == bits_of(two)
    places = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(m)} for m in (one, two)]
    assert not places[0] & places[1]


WIDE = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "vocab_size": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"num_attention_heads": 4, "vocab_size": 64}),
    "llama": ("LlamaForCausalLM", {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 64}),
    "bert": ("BertForPreTraining", {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}),
    "vit": ("ViTForImageClassification", {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}),
}  # fmt: skip


@pytest.fixture
def wide(tmp_path):
    """Writes a model of a family that a mesh can divide."""

    def write(model_type):
        architecture, fields = WIDE[model_type]
        save_pretrained(
            model_of_numbers(example(model_type, architecture, **fields).config), tmp_path
        )
        return tmp_path

    return write


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model_type", WIDE)
def test_on_a_mesh(model_type, mesh, wide, monkeypatch):
    folder, mesh = wide(model_type), mesh.build()
    made = []
    aligned = effscale.interop.pieces._aligned

    def watched(shape, dtype):
        made.append(aligned(shape, dtype))
        return made[-1]

    monkeypatch.setattr(effscale.interop.pieces, "_aligned", watched)
    model = load_pretrained(folder, mesh=mesh)
    monkeypatch.undo()
    assert bits_of(model) == bits_of(load_pretrained(folder))
    wanted = parameters(shardings(abstract_model(model.config), mesh))
    leaves = parameters(model)
    assert leaves.keys() == wanted.keys()
    divided = 0
    for name, leaf in leaves.items():
        array, sharding = leaf.get_value(), wanted[name].get_value()
        assert array.sharding.is_equivalent_to(sharding, array.ndim), name
        assert array.committed
        ways = array.size // np.prod(sharding.shard_shape(array.shape))
        divided += ways > 1
        # A buffer holds what one device holds, or, where several hold the same, what each of them does.
        shard = int(np.prod(sharding.shard_shape(array.shape))) * array.itemsize
        sizes = [b.nbytes for b in made if b.ctypes.data in _addresses(array)]
        assert all(size == shard for size in sizes)
    assert bool(divided) == (dict(mesh.shape)["data"] != 8)
    whole = max(leaf.get_value().nbytes for leaf in leaves.values())
    if dict(mesh.shape)["fsdp"] == 8:
        assert max(buffer.nbytes for buffer in made) < whole
    assert sum(buffer.nbytes for buffer in made) <= size_of(read_folder(folder))
    # It goes back to a file from there.
    save_pretrained(model, folder / "out")
    assert bytes_of(read_folder(folder / "out")) == bytes_of(read_folder(folder))


def _addresses(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
def test_a_donated_step_leaves_what_it_should(mesh, wide):
    """Buffers may be memory of NumPy's, and shared by devices: a step that writes in place must not write twice."""
    folder = wide("gpt2")
    expected = {
        name: np.asarray(leaf.get_value()) * 0.5 + 1
        for name, leaf in parameters(load_pretrained(folder)).items()
    }
    model = load_pretrained(folder, mesh=None if mesh is None else mesh.build())
    other = load_pretrained(folder)  # whose memory is another

    @jax.jit(donate_argnums=0)
    def step(model):
        return jax.tree.map(lambda x: x * 0.5 + 1, model)

    model = step(model)
    for name, leaf in parameters(model).items():
        for shard in leaf.get_value().addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[name][shard.index], err_msg=name)
    assert bits_of(other) == bits_of(load_pretrained(folder))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_what_is_loaded_trains(mesh, wide):
    """Steps with donated parameters and state: those of a copy that was made by JAX."""
    folder = wide("llama")
    mesh = None if mesh is None else mesh.build()
    loaded = load_pretrained(folder, mesh=mesh)
    copied = jax.tree.map(lambda x: jnp.array(x, copy=True), load_pretrained(folder))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 12)), jnp.int32)
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit(donate_argnums=(0, 1))
    def step(model, state):
        def loss(model):
            log_p = jax.nn.log_softmax(model(ids)[:, :-1])
            return -jnp.take_along_axis(log_p, ids[:, 1:, None], 2).mean()

        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, value

    def train(model):
        state, losses = optimizer.init(model), []
        for _ in range(3):
            model, state, value = step(model, state)
            losses.append(float(value))
        return model, losses

    expected, losses = train(copied)
    assert losses[-1] < losses[0]
    if mesh is None:
        model, found = train(loaded)
        assert found == losses
        assert bits_of(model) == bits_of(expected)
        return
    with jax.set_mesh(mesh):
        model, found = train(loaded)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-5)


def test_a_mesh_and_a_type(wide):
    folder = wide("llama")
    mesh = MeshConfig(fsdp=8, data=1).build()
    model = load_pretrained(folder, mesh=mesh, dtype="bfloat16")
    assert bits_of(model) == bits_of(load_pretrained(folder, dtype="bfloat16"))
    assert model.config == dataclasses.replace(load_pretrained(folder).config, dtype="bfloat16")
