"""Tiny models of every family, with parameters that hide no mistake."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import (
    Transformer,
    TransformerConfig,
    abstract_model,
    bert,
    bert_pretraining_heads,
    bloom,
    gpt2,
    gptj,
    llama,
    neox,
    opt,
    vit,
)

SIZE = {"num_layers": 2, "d_model": 24, "num_heads": 4}
TEXT = SIZE | {"vocab_size": 37}

TINY: dict[str, TransformerConfig] = {
    "gpt2": gpt2(**TEXT, max_length=24),
    "opt": opt(**TEXT, max_length=24),
    "opt-350m": opt(**TEXT, max_length=24, d_embed=16, post_norm=True),
    "bloom": bloom(**TEXT),
    "bloom-odd": bloom(**TEXT | {"num_heads": 6}, normed_residual=True),
    "gptj": gptj(**TEXT, rotary_dim=4),
    "neox": neox(**TEXT, rotary_fraction=0.67),
    "neox-sequential": neox(**TEXT, rotary_fraction=1.0, parallel=False),
    "llama": llama(**TEXT, num_kv_heads=2, d_ff=40),
    # All that Llama's relatives have: biases of some projections, norms of heads, windows in some layers.
    "qwen": llama(
        **TEXT, num_kv_heads=2, d_ff=40, bias=True, out_bias=False, qk_norm="head", window=(3, None)
    ),
    "bert": bert(**TEXT, max_length=24, heads=bert_pretraining_heads()),
    "vit": vit(**SIZE, image_size=8, patch_size=4, num_classes=5),
}
CAUSAL = [name for name, config in TINY.items() if config.causal]
# One model for each kind of positions, residual, norm and window that a decoder may have.
DECODERS = ["gpt2", "opt-350m", "bloom-odd", "gptj", "neox", "llama", "qwen"]


def build(config: TransformerConfig | str, **changes) -> Transformer:
    """A model whose every parameter is off its initial value: zero biases and unit scales would hide mistakes.

    Made by NumPy, since compiling the initialization of so many models would take most of the tests' time.
    """
    config = dataclasses.replace(TINY[config] if isinstance(config, str) else config, **changes)
    random = np.random.default_rng(7)

    def value(path, leaf):
        noise = random.normal(0, 0.15, leaf.shape).astype(np.float32)
        return jnp.asarray(noise + (path[-2].name == "scale"))

    return jax.tree_util.tree_map_with_path(value, abstract_model(config))


def tokens_of(config: TransformerConfig, batch: int = 3, seq: int = 9, seed: int = 1):
    ids = np.random.default_rng(seed).integers(0, config.inputs.vocab_size, (batch, seq))
    return jnp.asarray(ids, jnp.int32)


@pytest.fixture
def tiny():
    """From a name (or config) and changes of its fields to a model with random parameters."""
    return build


@pytest.fixture
def tokens():
    """Random ids for a config."""
    return tokens_of


def pytest_generate_tests(metafunc):
    """The arguments `family`, `causal_family` and `decoder` run over the tiny models."""
    for argument, names in (
        ("family", list(TINY)),
        ("causal_family", CAUSAL),
        ("decoder", DECODERS),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
