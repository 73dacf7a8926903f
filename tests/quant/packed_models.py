"""Small packed models, and the recipes that make them, for the tests of files."""

import jax
import numpy as np
from flax import nnx

from effscale.interop.save import their_tensors
from effscale.models import Transformer, llama
from effscale.quant import Format, Recipe, Rule, dequantize_model, quantize_model

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 2, "d_ff": 48, "vocab_size": 50}
LLAMA = llama(**SIZES, num_kv_heads=1)
IDS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
TOKENS = Format(granularity="token", spread="centered")
GROUPS = Format(bits=4, granularity="group", group_size=16)
LAYERS = r"layers\..*kernel"

run = jax.jit(lambda model, ids: model(ids))


def recipe(*pairs):
    """Rules of (where, weights) or (where, weights, activations)."""
    return Recipe(
        tuple(Rule(where=w, weights=f, activations=a[0] if a else None) for w, f, *a in pairs)
    )


ATTENTION = r"layers\..*attention\..*kernel"
# A format per matrix of a layer.
SYMMETRIC = {
    "query": (Format(),),
    "key": (Format(granularity="tensor"),),
    "value": (GROUPS,),
    "out": (Format(bits=4),),
    "gate": (Format(bits=2),),
    "up": (Format(bits=3, granularity="block", num_blocks=2),),
    "down": (Format(bits=4, granularity="group", group_size=8),),
}
EVERY = SYMMETRIC | {
    "key": (Format(), TOKENS),
    "out": (Format(bits=4, granularity="group", group_size=16, symmetric=False),),
    "down": (Format(symmetric=False), TOKENS),
}


def by_matrix(formats):
    return recipe(*((rf"layers\..*{name}\.kernel", *what) for name, what in formats.items()))


RECIPES = {
    "every format": by_matrix(EVERY),
    "symmetric": by_matrix(SYMMETRIC),
    "W4/8A8": recipe((ATTENTION, Format(), TOKENS), (LAYERS, GROUPS, TOKENS)),
    "W4 asymmetric": recipe((LAYERS, Format(bits=4, symmetric=False))),
    "by layer": recipe((r"layers\.1\..*kernel", GROUPS), (LAYERS, Format(), TOKENS)),
}


make = jax.jit(lambda config: Transformer(config, rngs=nnx.Rngs(0)), static_argnums=0)
pack = jax.jit(quantize_model, static_argnums=1)
unpack = jax.jit(dequantize_model)


def quantized(model, name):
    """In one program: operation by operation, most of the time would be spent compiling."""
    return pack(model, RECIPES[name] if isinstance(name, str) else name)


def values(model):
    """The numbers that the weights stand for, by their names in files."""
    return dict(their_tensors(unpack(model)))
