import jax
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer, llama
from effscale.quant import Format, Recipe, Rule, quantize_model, sensitivity
from effscale.quant.sensitivity import _part
from effscale.training import next_token_loss

RECIPE = Recipe(
    (
        Rule(where=r"layers\..*attention\..*kernel", weights=Format(bits=4)),
        Rule(where=r"layers\.2\..*kernel", weights=Format(bits=3), activations=Format(granularity="token")),
        Rule(where=r"embed\.tokens", weights=Format(bits=2)),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = llama(num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, vocab_size=32)
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    ids = jax.random.randint(jax.random.key(0), (2, 3, 9), 0, 32)
    return [{"input_ids": rows[:, :-1], "labels": rows[:, 1:]} for rows in ids]


def mean_loss(model, batch):
    return next_token_loss(model, batch).mean()


def growth(model, small, batches):
    loss = jax.jit(mean_loss)
    means = [[float(loss(m, batch)) for batch in batches] for m in (model, small)]
    return np.mean(means[1]) - np.mean(means[0])


def alone(pattern, format, activations=None):
    return Recipe((Rule(where=pattern, weights=format, activations=activations),))


def test_each_part_is_what_quantizing_it_alone_gives(model, batches):
    tokens = Format(granularity="token")
    by_layer = sensitivity(model, RECIPE, mean_loss, batches)
    assert list(by_layer) == ["layers.0", "layers.1", "layers.2", "embed.tokens.embedding"]
    only = quantize_model(model, alone(r"layers\.1\..*attention\..*kernel", Format(bits=4)))
    assert by_layer["layers.1"] == pytest.approx(growth(model, only, batches), abs=2e-6)
    table = quantize_model(model, alone(r"embed\.tokens", Format(bits=2)))
    grown = growth(model, table, batches)
    assert by_layer["embed.tokens.embedding"] == pytest.approx(grown, abs=2e-6)
    by_kind = sensitivity(model, RECIPE, mean_loss, batches, by="kind")
    only = quantize_model(
        model, alone(r"layers\.2\.feed_forward\.down\.kernel", Format(bits=3), tokens)
    )
    assert by_kind["feed_forward.down.kernel"] == pytest.approx(
        growth(model, only, batches), abs=2e-6
    )


@pytest.mark.parametrize(
    ("by", "part"),
    [
        ("layer", "layers.12"),
        ("kind", "attention.query.kernel"),
        ("weight", "layers.12.attention.query.kernel"),
    ],
)
def test_the_part_that_a_weight_belongs_to(by, part):
    assert _part("layers.12.attention.query.kernel", by) == part
    assert _part("embed.tokens.embedding", by) == "embed.tokens.embedding"


def test_bad_input(model, batches):
    with pytest.raises(ValueError, match="batches must not be empty"):
        sensitivity(model, RECIPE, mean_loss, [])
    with pytest.raises(ValueError, match="no_such"):
        sensitivity(model, alone("no_such", Format()), mean_loss, batches)
