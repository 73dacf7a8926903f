"""Published sizes by name. A preset is only a config: nothing is allocated until you build a model from it."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from effscale.models.config import TransformerConfig
from effscale.models.families import bert, bloom, gpt2, gptj, llama, neox, opt, vit
from effscale.models.transformer import Transformer
from effscale.options import did_you_mean


def _sizes(
    family: Callable[..., TransformerConfig], table: dict[str, tuple[int, int, int]], **fixed
):
    """Return presets from a table of (layers, width, heads)."""
    return {
        name: partial(family, num_layers=layers, d_model=width, num_heads=heads, **fixed)
        for name, (layers, width, heads) in table.items()
    }


PRESETS: dict[str, Callable[[], TransformerConfig]] = {
    # Radford et al., 2019, table 2; the smallest is the released model with 124M parameters.
    **_sizes(
        gpt2,
        {
            "gpt2": (12, 768, 12),
            "gpt2-medium": (24, 1024, 16),
            "gpt2-large": (36, 1280, 20),
            "gpt2-xl": (48, 1600, 25),
        },
    ),
    # Brown et al., 2020, table 2.1.
    **_sizes(
        gpt2,
        {
            "gpt3-125m": (12, 768, 12),
            "gpt3-350m": (24, 1024, 16),
            "gpt3-760m": (24, 1536, 16),
            "gpt3-1.3b": (24, 2048, 16),
            "gpt3-2.7b": (32, 2560, 32),
            "gpt3-6.7b": (32, 4096, 32),
            "gpt3-13b": (40, 5120, 40),
            "gpt3-175b": (96, 12288, 96),
        },
        max_length=2048,
    ),
    # Zhang et al., 2022, table 1.
    **_sizes(
        opt,
        {
            "opt-125m": (12, 768, 12),
            "opt-1.3b": (24, 2048, 32),
            "opt-2.7b": (32, 2560, 32),
            "opt-6.7b": (32, 4096, 32),
            "opt-13b": (40, 5120, 40),
            "opt-30b": (48, 7168, 56),
            "opt-66b": (64, 9216, 72),
            "opt-175b": (96, 12288, 96),
        },
    ),
    **_sizes(opt, {"opt-350m": (24, 1024, 16)}, d_embed=512, post_norm=True),
    # Le Scao et al., 2022, table 3.
    **_sizes(
        bloom,
        {
            "bloom-560m": (24, 1024, 16),
            "bloom-1b1": (24, 1536, 16),
            "bloom-1b7": (24, 2048, 16),
            "bloom-3b": (30, 2560, 32),
            "bloom-7b1": (30, 4096, 32),
            "bloom": (70, 14336, 112),
        },
    ),
    **_sizes(gptj, {"gpt-j-6b": (28, 4096, 16)}),
    # Black et al., 2022, and Biderman et al., 2023, table 1.
    **_sizes(neox, {"gpt-neox-20b": (44, 6144, 64)}, activation="gelu_fast"),
    **_sizes(
        neox,
        {
            "pythia-70m": (6, 512, 8),
            "pythia-160m": (12, 768, 12),
            "pythia-410m": (24, 1024, 16),
            "pythia-1b": (16, 2048, 8),
        },
        vocab_size=50304,
    ),
    "pythia-1.4b": partial(neox, num_layers=24, d_model=2048, num_heads=16, vocab_size=50304),
    "pythia-2.8b": partial(neox, num_layers=32, d_model=2560, num_heads=32, vocab_size=50304),
    "pythia-6.9b": partial(neox, num_layers=32, d_model=4096, num_heads=32),
    "pythia-12b": partial(neox, num_layers=36, d_model=5120, num_heads=40, vocab_size=50688),
    # Touvron et al., 2023 (both papers), table 2 and table 1; Dubey et al., 2024, table 3.
    "llama-7b": partial(llama, num_layers=32, d_model=4096, num_heads=32, d_ff=11008, epsilon=1e-6),
    "llama-13b": partial(
        llama, num_layers=40, d_model=5120, num_heads=40, d_ff=13824, epsilon=1e-6
    ),
    "llama-33b": partial(
        llama, num_layers=60, d_model=6656, num_heads=52, d_ff=17920, epsilon=1e-6
    ),
    "llama-65b": partial(llama, num_layers=80, d_model=8192, num_heads=64, d_ff=22016),
    "llama2-7b": partial(llama, num_layers=32, d_model=4096, num_heads=32, d_ff=11008),
    "llama2-13b": partial(llama, num_layers=40, d_model=5120, num_heads=40, d_ff=13824),
    "llama2-70b": partial(
        llama, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28672
    ),
    "llama3-8b": partial(
        llama,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14336,
        vocab_size=128256,
        rotary_base=5e5,
    ),
    "llama3-70b": partial(
        llama,
        num_layers=80,
        d_model=8192,
        num_heads=64,
        num_kv_heads=8,
        d_ff=28672,
        vocab_size=128256,
        rotary_base=5e5,
    ),
    "smollm2-135m": partial(
        llama,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        d_ff=1536,
        vocab_size=49152,
        rotary_base=1e5,
        tied=True,
    ),
    # Devlin et al., 2018, section 3.
    **_sizes(bert, {"bert-base": (12, 768, 12), "bert-large": (24, 1024, 16)}),
    # Dosovitskiy et al., 2020, table 1; the small ones from Touvron et al., 2021.
    **_sizes(
        vit,
        {
            "vit-tiny": (12, 192, 3),
            "vit-small": (12, 384, 6),
            "vit-base": (12, 768, 12),
            "vit-large": (24, 1024, 16),
        },
    ),
    **_sizes(vit, {"vit-huge": (32, 1280, 16)}, patch_size=14),
}
"""The configs of published models by name; ``preset`` calls one."""


def preset(name: str) -> TransformerConfig:
    """Return the config of a published size.

    Args:
        name: A key of ``effscale.models.PRESETS``, such as ``"gpt2"`` or ``"bloom-560m"``.

    Returns:
        The config; change a field with ``dataclasses.replace``.

    Raises:
        ValueError: The preset does not exist; the message suggests similar names.

    Example:
        >>> f"{num_params(preset('gpt2')):,}"
        '124,439,808'
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()


def abstract_model(config: TransformerConfig) -> Transformer:
    """Return the model with shapes in place of arrays, which needs no memory for any size."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def num_params(config: TransformerConfig) -> int:
    """Return the number of parameters of the model; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)))
