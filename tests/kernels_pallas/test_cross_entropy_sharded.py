"""The op on a mesh of eight devices equals the op on one, in each way of using it there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas
from benchmarks.kernels.cross_entropy import Operands, Shape
from kernels_pallas.dispatch import Unsupported
from tests.kernels_pallas.cross_entropy_oracle import Oracle, assert_close, oracle

SHAPE = Shape(name="sharded", tokens=512, d=32, vocab=4096)
SPECS = Operands(P("data"), P("tensor"), P("tensor"), P("data"), P("data"))


def mesh_of(data, tensor):
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def loss_of(token_axes=(), implementation=None):
    return lambda hidden, vocab_weight, bias, labels, weights: kernels_pallas.cross_entropy(
        hidden,
        vocab_weight,
        labels,
        weights=weights,
        bias=bias,
        z_loss=0.02,
        token_axes=token_axes,
        implementation=implementation,
    )


def place(operands, mesh):
    return Operands(
        *(jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(operands, SPECS, strict=True))
    )


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("token_axes", [(), ("data",)])
def test_partitioned_by_the_compiler(sizes, token_axes, getkey):
    operands, mesh = SHAPE.operands(getkey()), mesh_of(*sizes)
    with jax.set_mesh(mesh):
        function = jax.jit(jax.value_and_grad(loss_of(token_axes), (0, 1, 2, 4)))
        loss, gradients = function(*place(operands, mesh))
    assert_close(Oracle(loss, *gradients), oracle(operands, 0.02), jnp.float32)
    assert gradients[0].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    assert gradients[1].sharding.is_equivalent_to(NamedSharding(mesh, P("tensor")), 2)


def collectives(token_axes, mesh):
    shape = Shape(name="many chunks", tokens=4096, d=32, vocab=8192)
    with jax.set_mesh(mesh):
        types = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, p))
            for x, p in zip(shape.abstract(), SPECS, strict=True)
        ]
        gradient = jax.jit(jax.value_and_grad(loss_of(token_axes), (0, 1)))
        text = gradient.lower(*types).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" ({kinds})(?:-start)?\(.*?op_name=\"([^\"]*)\"", text)
    return [kind for kind, _ in found], [kind for kind, name in found if "while" in name]


def test_token_axes_leave_one_sum_after_the_loop():
    everywhere, in_loop = collectives(("data",), mesh_of(8, 1))
    assert set(everywhere) == {"all-reduce"}
    assert not in_loop
    # Without it: right all the same, with the weight's gradient summed once a chunk, and no token
    # moved.
    everywhere, in_loop = collectives((), mesh_of(8, 1))
    assert set(everywhere) == {"all-reduce"}
    assert in_loop


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map(check_vma, getkey):
    """As under a technique that handles its own data parallelism: each device sees its tokens."""
    operands, mesh = SHAPE.operands(getkey()), mesh_of(8, 1)

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(P("data"), P(), P(), P("data"), P("data")),
        out_specs=(P(), (P("data"), P())),
        check_vma=check_vma,
    )
    def each(*operands):
        hidden, weight, bias, labels, weights = operands
        loss, (d_hidden, d_weight) = jax.value_and_grad(loss_of(), (0, 1))(
            hidden, weight, bias, labels, weights
        )
        if (
            not check_vma
        ):  # only the checked form knows that `weight` is shared, and sums its gradient
            d_weight = jax.lax.psum(d_weight, "data")
        return jax.lax.psum(loss, "data"), (d_hidden, d_weight)

    loss, (d_hidden, d_weight) = each(*operands)
    found = Oracle(loss, d_hidden, d_weight, None, oracle(operands, 0.02).weights)
    assert_close(found, oracle(operands, 0.02), jnp.float32)


def test_a_named_kernel_is_refused_where_the_compiler_partitions():
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh):
        with pytest.raises(Unsupported, match=r"\('data', 'tensor'\) are partitioned"):
            jax.eval_shape(loss_of((), "tpu"), *SHAPE.abstract())
        with pytest.raises(Unsupported, match=r"\('tensor',\) are partitioned"):
            jax.eval_shape(loss_of(("data",), "tpu"), *SHAPE.abstract())
    with jax.set_mesh(mesh_of(8, 1)):
        traced = jax.jit(jax.grad(loss_of(("data",)))).trace(*SHAPE.abstract())
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_tokens_that_the_axes_cannot_divide():
    with jax.set_mesh(mesh_of(8, 1)):
        uneven = Shape(name="uneven", tokens=20, d=8, vocab=16).abstract()
        with pytest.raises(
            ValueError, match=r"20 tokens into 8 unequal parts\. Use a multiple of 8"
        ):
            jax.eval_shape(loss_of(("data",)), *uneven)


def test_axes_that_are_not_in_the_mesh_do_nothing(getkey):
    operands = Shape(name="alone", tokens=20, d=8, vocab=16).operands(getkey())
    np.testing.assert_array_equal(loss_of(("data",))(*operands), loss_of()(*operands))


def test_without_jit_on_a_mesh(getkey):
    operands, mesh = SHAPE.operands(getkey()), mesh_of(4, 2)
    with jax.set_mesh(mesh):
        loss = loss_of(("data",))(*place(operands, mesh))
    np.testing.assert_allclose(loss, oracle(operands, 0.02).loss, rtol=2e-6)
