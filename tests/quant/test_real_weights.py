"""A trained model in fewer bits, on real text."""

import pathlib
import statistics

import jax
import numpy as np
import pytest

from effscale.experiments.shared import assets
from effscale.interop import load_pretrained, load_tokenizer
from effscale.quant import Format, Recipe, Rule, quantize_model, w8a8

run = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        file = assets.smollm2_file()
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    text = pathlib.Path(statistics.__file__).read_text()
    ids = np.array([load_tokenizer(file).encode(text).ids[:128]], np.int32)
    model = load_pretrained(file)
    return model, ids, loss(model, ids)


def loss(model, ids):
    logits = np.asarray(run(model, ids), np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


def test_eight_bits_cost_next_to_nothing(smollm2):
    """Weights per output and inputs per token, on Python source: about 0.009 nats of 2.07."""
    model, ids, exact = smollm2
    small = quantize_model(model, w8a8())
    size = lambda m: sum(x.nbytes for x in jax.tree.leaves(m.groups))
    assert size(small) < 0.27 * size(model)
    assert abs(loss(small, ids) - exact) < 0.03


@pytest.mark.slow  # 29 s; the eight bits above go through the same code
def test_the_file_s_own_four_bits_are_found_again(smollm2):
    """It came in groups of 32 with a scale and a least number (Q4_1): the same format loses nothing, and per channel much is lost."""
    model, ids, exact = smollm2
    own = Format(bits=4, granularity="group", group_size=32, symmetric=False, integer_zero=False)
    recipe = lambda format: Recipe((Rule(where=r"layers\..*kernel", weights=format),))
    assert loss(quantize_model(model, recipe(own)), ids) == pytest.approx(exact, abs=1e-4)
    assert loss(quantize_model(model, recipe(Format(bits=4))), ids) > exact + 0.3
