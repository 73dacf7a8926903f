"""Norms of queries and keys, over each head or over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import llama
from effscale.models.positions import rotary_angles, rotate
from effscale.parallel import MeshConfig, shard

run = jax.jit(lambda model, ids: model(ids))


def of(over):
    """A Llama with norms."""
    sizes = {"num_layers": 2, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "d_ff": 40}
    return llama(**sizes, vocab_size=37, qk_norm=over)


@pytest.mark.parametrize(("over", "width"), [("head", 6), ("all", 24)])
def test_queries_are_normed_and_then_rotated(over, width, tiny, tokens):
    model = tiny(of(over))
    ids = tokens(model.config, 2, 8)
    encode = jax.jit(lambda m: m.encode(ids, capture=("attention_in", "query")))
    found = {point: np.asarray(v[0]) for point, v in encode(model).captured[0][0].items()}
    attention = model.groups[0].blocks[0].attention
    kernel, scale = attention.query.kernel.get_value()[0], attention.query_norm.scale.get_value()[0]
    assert scale.shape == (width,)
    query = (found["attention_in"] @ np.asarray(kernel)).reshape(2, 8, -1, width)
    query = query / np.sqrt(np.square(query).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    query = query.reshape(2, 8, 4, 6).swapaxes(1, 2)
    angles = rotary_angles(jnp.arange(8)[None], 6, 10000.0, None)
    turned = rotate(jnp.asarray(query), angles, model.config.positions)
    np.testing.assert_allclose(found["query"], np.asarray(turned) * 6**-0.5, atol=1e-5)


@pytest.mark.parametrize("over", ["head", "all"])
def test_heads_on_several_devices(over, tiny, tokens):
    model = tiny(of(over))
    ids = tokens(model.config, 4, 8)
    expected = run(model, ids)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    with jax.set_mesh(mesh):
        found = run(shard(model, mesh), ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_models_have_no_such_parameters(tiny):
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(tiny("llama")))]
    assert not [path for path in paths if "query_norm" in path or "key_norm" in path]
