import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.optim.lamb import stacked_dims
from effscale.training import decay_mask, named_leaves
from effscale.training.partition import combine, partition, trainable_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight with integer content and a trained part."""

    q: Any
    a: Any


class Mixed(nnx.Module):
    def __init__(self, *, rngs):
        self.value = nnx.Linear(2, 2, rngs=rngs)  # a module that is called like what Variables hold
        self.groups = nnx.List([nnx.LayerNorm(2, rngs=rngs)])
        self.kernel = nnx.Param(
            Packed(jnp.arange(4, dtype=jnp.int8), jnp.ones(4)), axes=("embed", "mlp")
        )
        self.nothing = None


@pytest.fixture
def model():
    return Mixed(rngs=nnx.Rngs(0))


def test_names_follow_attributes_and_weights_fields(model):
    leaves = named_leaves({"model": model, "list": [jnp.ones(1)]})
    assert [leaf.name for leaf in leaves] == [
        "list.0",
        "model.groups.0.bias",
        "model.groups.0.scale",
        "model.kernel.q",
        "model.kernel.a",
        "model.value.bias",
        "model.value.kernel",
    ]
    assert [
        leaf.leaf is other
        for leaf, other in zip(leaves, jax.tree.leaves({"model": model, "list": [1]}), strict=True)
    ][1:] == [True] * 6
    assert leaves[3].variable == "model.kernel"
    assert leaves[3].axes == ("embed", "mlp")


def test_partition_and_combine_are_inverse_and_survive_jit_grad_and_optax(model):
    trained, frozen = partition(model)
    assert [leaf.name for leaf in named_leaves(frozen)] == ["kernel.q"]
    assert jax.tree.structure(combine(trained, frozen)) == jax.tree.structure(model)

    @jax.jit
    def step(trained, frozen, x):
        def loss(trained):
            whole = combine(trained, frozen)
            weight = whole.kernel.get_value()
            return (whole.value(x) ** 2).sum() + (weight.a * weight.q.astype(jnp.float32)).sum()

        return jax.grad(loss)(trained)

    gradient = step(trained, frozen, jnp.ones((3, 2)))
    assert gradient.kernel.get_value().q is None
    np.testing.assert_array_equal(gradient.kernel.get_value().a, [0, 1, 2, 3])
    optimizer = optax.sgd(0.5)
    updates, _ = optimizer.update(gradient, optimizer.init(trained), trained)
    whole = combine(optax.apply_updates(trained, updates), frozen)
    np.testing.assert_allclose(whole.kernel.get_value().a, [1, 0.5, 0, -0.5])
    np.testing.assert_array_equal(whole.kernel.get_value().q, [0, 1, 2, 3])


def test_trainable_by_pattern_and_by_predicate(model):
    by_pattern = trainable_mask(model, r"^value\.")
    by_predicate = trainable_mask(model, lambda name: name.startswith("value."))
    assert jax.tree.leaves(by_pattern) == jax.tree.leaves(by_predicate) == [False] * 4 + [True] * 2


def test_nothing_to_train_is_an_error(model):
    with pytest.raises(ValueError, match=r"trainable='lora'.*groups\.0\.bias"):
        partition(model, "lora")


def test_an_alternative_that_trains_nothing_is_an_error(model):
    # `kernel.q` holds integers, which are never trained.
    with pytest.raises(ValueError, match=r"the alternative 'kernel\\\\.q' matches no parameter"):
        partition(model, r"value|kernel\.q")


def test_decay_goes_by_axes_then_by_name(toy, model):
    names = lambda mask, tree: [
        leaf.name
        for leaf, keep in zip(named_leaves(tree), jax.tree.leaves(mask), strict=True)
        if keep
    ]
    stacked = toy.Toy(rngs=nnx.Rngs(0))
    # The stacked bias is a matrix, and yet a bias.
    assert stacked.blocks.bias.shape == (toy.LAYERS, toy.WIDTH)
    assert names(decay_mask(stacked), stacked) == ["blocks.kernel", "embedding"]
    assert names(decay_mask(stacked, include="bias", exclude="embedding"), stacked) == [
        "blocks.bias",
        "blocks.kernel",
    ]
    assert names(decay_mask(model), model) == ["kernel.q", "kernel.a", "value.kernel"]


@pytest.mark.parametrize(
    ("axes", "decays", "stacked"),
    [
        (("layers", "mlp"), False, 1),
        (("experts", "mlp"), False, 1),
        (("experts", "embed", "mlp"), True, 1),
        (("layers", "experts", "mlp"), False, 2),
        (("layers", "experts", "embed", "mlp"), True, 2),
        (("embed", "experts"), True, 0),  # a router
        (("experts",), False, 0),  # its bias
        (("layers", "experts"), False, 1),
    ],
)
def test_layers_and_experts_stack_tensors_and_are_no_axes_of_theirs(axes, decays, stacked):
    """Weight decay leaves the experts' biases alone, and LAMB takes each expert for a layer."""
    shape = tuple(range(2, 2 + len(axes)))
    params = {"p": nnx.Param(jnp.ones(shape), axes=axes)}
    assert jax.tree.leaves(decay_mask(params)) == [decays]
    assert jax.tree.leaves(stacked_dims(params)) == [stacked]
