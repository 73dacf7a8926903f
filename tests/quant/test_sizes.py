"""How many bytes a model takes."""

import jax
import pytest
from flax import nnx

from effscale.models import ClassHead, Transformer, bert, gpt2, take_layers
from effscale.quant import (
    Format,
    Recipe,
    Rule,
    fake_quantize_model,
    model_size,
    quantize_model,
    w1a8,
    w2a8,
    w4a8,
    w8a8,
)
from effscale.quant.sizes import ModelSize

MEBIBYTE = 2**20


def bert_base(layers):
    """As fine-tuned on MNLI, of three classes."""
    head = ClassHead(num_classes=3, pool="pooled")
    return bert(num_layers=layers, d_model=768, num_heads=12, heads=(head,))


@pytest.mark.parametrize(
    ("layers", "recipe", "codes", "codes_ratio", "total", "total_ratio"),
    [
        (12, w1a8(), 12.92, 32.3, 17.27, 24.2),
        (6, w1a8(), 7.86, 53.2, 11.98, 34.9),
        (5, w1a8(), 7.01, 59.6, 11.09, 37.6),
        (12, w2a8(), 25.84, 16.2, 30.19, 13.8),
    ],
)
def test_bert_base_as_in_the_facts(layers, recipe, codes, codes_ratio, total, total_ratio):
    """Counted both ways, in MiB and as how many times smaller than the float model of 12 layers; 32.3 is the paper's 32."""
    original = model_size(bert_base(12))
    assert round(original.total / MEBIBYTE, 2) == 417.65
    assert round(original.total / 4 / 1e6, 2) == 109.48
    size = model_size(bert_base(layers), recipe)
    assert round(size.codes / MEBIBYTE, 2) == codes
    assert round(size.total / MEBIBYTE, 2) == total
    assert round(original.total / size.codes, 1) == codes_ratio
    assert round(original.total / size.total, 1) == total_ratio
    assert size.describe(original) == (
        f"{total} MiB ({total_ratio}x smaller); the codes alone: {codes} MiB ({codes_ratio}x)"
    )


MIXED = Recipe(
    (
        Rule(where=r"layers\.1\..*kernel", weights=Format(bits=4, symmetric=False)),
        Rule(where=r"layers\..*up\.kernel", weights=Format(bits=3)),
    )
)


@pytest.mark.parametrize("recipe", [w8a8(), w4a8(16), w1a8(), MIXED])
def test_what_is_foretold_is_what_the_packed_model_takes(recipe):
    config = gpt2(num_layers=3, d_model=32, num_heads=2, vocab_size=64, max_length=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    packed = quantize_model(model, recipe)
    size = model_size(config, recipe)
    assert size == model_size(model, recipe) == model_size(packed)
    assert size.total == sum(x.nbytes for x in jax.tree.leaves(packed))
    assert min(size.codes, size.scales, size.unquantized) > 0


def test_a_float_model_has_no_codes():
    config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=64, max_length=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    size = model_size(model)
    assert size == ModelSize(codes=0, scales=0, unquantized=size.total) == model_size(config)
    assert model_size(fake_quantize_model(model, w1a8())) == size  # it still holds its floats
    assert size.describe(size).endswith("MiB (1.0x smaller)")
    one = model_size(take_layers(model, [1]))
    assert size.total - one.total == sum(x.nbytes for x in jax.tree.leaves(model.groups)) // 2


def test_a_recipe_of_another_model_is_refused():
    config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=64, max_length=16)
    with pytest.raises(ValueError, match="layers"):
        model_size(config, Recipe((Rule(where=r"layers\.7\..*kernel", weights=Format()),)))
