"""The op in plain jnp: values, gradients, the rule for labels, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas
from benchmarks.kernels.cross_entropy import SHAPES, Shape, with_tag
from kernels_pallas.cross_entropy.api import IMPLEMENTATIONS, check_operands
from kernels_pallas.cross_entropy.chunked import chunk_size, chunked_loss_and_gradients
from kernels_pallas.dispatch import check_name
from tests.kernels_pallas.cross_entropy_oracle import assert_close, oracle, run
from tests.kernels_pallas.support import named

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}


def op(implementation=None, z_loss=0.0):
    return lambda hidden, vocab_weight, bias, labels, weights: kernels_pallas.cross_entropy(
        hidden,
        vocab_weight,
        labels,
        weights=weights,
        bias=bias,
        z_loss=z_loss,
        implementation=implementation,
    )


@named(SMALL)
@pytest.mark.parametrize("implementation", ["reference", "chunked", None])
@pytest.mark.parametrize(("z_loss", "with_bias"), [(0.0, False), (0.02, True)])
def test_values_and_gradients(shape, implementation, z_loss, with_bias, getkey):
    operands = shape.operands(getkey())
    found = run(op(implementation, z_loss), operands, with_bias)
    assert_close(found, oracle(operands, z_loss, with_bias), jnp.dtype(shape.dtype))


def test_gradients_have_the_types_of_their_operands(getkey):
    operands = BY_NAME["odd-bf16"].operands(getkey())
    found = run(op(), operands)
    assert found.loss.dtype == jnp.float32
    assert found.hidden.dtype == jnp.bfloat16
    assert found.vocab_weight.dtype == found.bias.dtype == found.weights.dtype == jnp.float32
    low = operands._replace(vocab_weight=operands.vocab_weight.astype(jnp.bfloat16))
    assert run(op(), low).vocab_weight.dtype == jnp.bfloat16


def test_loss_alone_equals_the_loss_with_gradients(getkey):
    operands = BY_NAME["odd"].operands(getkey())
    alone = jax.jit(op(z_loss=0.1))(*operands)
    np.testing.assert_allclose(alone, run(op(z_loss=0.1), operands).loss, rtol=1e-6)


def test_the_cotangent_scales_the_gradients(getkey):
    operands = BY_NAME["tiny"].operands(getkey())
    once = run(op(), operands)
    thrice = run(lambda *args: 3.0 * op()(*args), operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3.0 * a, b, rtol=1e-6), once, thrice)


def test_no_weights_are_weights_of_one(getkey):
    hidden, weight, _, labels, weights = BY_NAME["tiny"].operands(getkey())
    plain = kernels_pallas.cross_entropy(hidden, weight, labels)
    ones = kernels_pallas.cross_entropy(hidden, weight, labels, weights=jnp.ones_like(weights))
    assert plain == ones


@pytest.mark.parametrize("label", [-1, -100, 64, 10**6])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_label_outside_the_vocabulary_is_ignored(label, implementation, getkey):
    operands = BY_NAME["tiny"].operands(getkey())
    labels = jnp.where(jnp.arange(24) == 7, label, jnp.abs(operands.labels) % 64)
    found = run(op(implementation, z_loss=0.1), operands._replace(labels=labels))
    weightless = operands._replace(
        labels=jnp.where(labels == label, 0, labels), weights=operands.weights.at[7].set(0.0)
    )
    expected = run(op(implementation, z_loss=0.1), weightless)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(found.vocab_weight, expected.vocab_weight, atol=1e-6)
    assert not found.hidden[7].any()
    assert found.weights[7] == 0


def test_all_labels_ignored_is_zero(getkey):
    operands = BY_NAME["tiny"].operands(getkey())
    found = run(op(), operands._replace(labels=jnp.full((24,), -100)))
    assert all(not np.asarray(value).any() for value in found)


def test_logits_far_from_zero_stay_finite(getkey):
    operands = BY_NAME["tiny"].operands(getkey())
    far = operands._replace(hidden=operands.hidden * 1e4)
    assert_close(run(op(), far), oracle(far), jnp.float32)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 70),
    d=st.integers(1, 9),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 80),
    z_loss=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**17),
)
def test_any_size_and_chunk(tokens, d, vocab, chunk, z_loss, seed):
    operands = Shape(name="any", tokens=tokens, d=d, vocab=vocab).operands(jax.random.key(seed))
    counted = operands.labels >= 0
    masked = operands._replace(weights=jnp.where(counted, operands.weights, 0.0))
    function = functools.partial(chunked_loss_and_gradients, z_loss=z_loss, chunk_tokens=chunk)
    loss, gradients = jax.jit(function)(*masked)
    expected = oracle(operands, z_loss)
    np.testing.assert_allclose(loss, expected.loss, rtol=2e-5, atol=2e-5)
    for name in ("hidden", "vocab_weight", "bias", "weights"):
        target = getattr(expected, name)
        tolerance = 2e-5 * (1 + np.abs(target).max())
        np.testing.assert_allclose(getattr(gradients, name), target, rtol=0, atol=tolerance)


@given(tokens=st.integers(0, 10**6), target=st.integers(1, 10**4))
def test_chunk_sizes_waste_little(tokens, target):
    chunk = chunk_size(tokens, target)
    chunks = -(-tokens // chunk)
    assert 1 <= chunk <= target
    assert tokens <= chunk * chunks < tokens + max(chunks, 1)


def test_chunk_size_prefers_a_divisor():
    assert chunk_size(2048, 256) == 256
    assert chunk_size(1000, 256) == 250
    assert chunk_size(1021, 256) == 256


def largest_array(function, *operands) -> int:
    """Elements of the largest floating-point array that an equation of the function makes."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                aval = variable.aval
                if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating):
                    yield aval.size
            for parameter in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return max(walk(jax.make_jaxpr(function)(*operands).jaxpr))


def test_logits_are_never_held_whole():
    shape = Shape(name="long", tokens=16384, d=64, vocab=8192)
    operands = shape.abstract()
    whole = shape.tokens * shape.vocab
    gradient = lambda implementation: jax.value_and_grad(op(implementation), (0, 1, 2, 4))
    assert largest_array(gradient("reference"), *operands) == whole
    for implementation in ("chunked", None):
        assert largest_array(gradient(implementation), *operands) <= whole // 8
        assert largest_array(op(implementation), *operands) <= whole // 8


def test_memory_does_not_grow_with_the_tokens():
    def temporary(tokens):
        operands = Shape(name="t", tokens=tokens, d=16, vocab=8192).abstract()
        compiled = jax.jit(jax.value_and_grad(op("chunked"), (0, 1))).lower(*operands).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(8192)
    logits_of_the_rest = 4 * 8192 * (8192 - 1024)
    assert long - short < logits_of_the_rest / 50


def test_unused_gradients_cost_nothing():
    """A frozen vocabulary, as under LoRA: the product for its gradient alone is dropped."""
    operands = Shape(name="t", tokens=256, d=64, vocab=1024).abstract()
    products = []
    for which in ((0, 1), (0,)):
        compiled = jax.jit(jax.grad(op("chunked"), which)).lower(*operands).compile()
        products.append(compiled.cost_analysis()["flops"])
    assert products[1] < 0.75 * products[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (24, 31)}, r"\(24, 31\).*transpose a \[d, vocab\] kernel"),
        ({"hidden": (2, 12, 32)}, r"Reshape \[batch, seq, d\]"),
        ({"labels": (23,)}, r"labels must have the shape \(24,\), got \(23,\)"),
        ({"weights": (24, 1)}, r"weights must have the shape \(24,\), got \(24, 1\)"),
        ({"bias": (65,)}, r"bias must have the shape \(64,\), got \(65,\)"),
    ],
)
def test_shapes_that_cannot_go_together(change, message):
    operands = BY_NAME["tiny"].abstract()._asdict()
    for name, shape in change.items():
        operands[name] = jax.ShapeDtypeStruct(shape, operands[name].dtype)
    with pytest.raises(ValueError, match=message):
        check_operands(**operands, z_loss=0.0)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("hidden", jnp.float16, "hidden must be float32 or bfloat16, got float16"),
        ("weights", jnp.bfloat16, "weights must be float32, .*, got bfloat16"),
        (
            "labels",
            jnp.uint32,
            "labels must have a signed integer dtype, such as int32, .*, got uint32",
        ),
    ],
)
def test_types_that_cannot_be_served(name, dtype, message):
    operands = BY_NAME["tiny"].abstract()._asdict()
    operands[name] = jax.ShapeDtypeStruct(operands[name].shape, dtype)
    with pytest.raises(ValueError, match=message):
        check_operands(**operands, z_loss=0.0)


def test_a_negative_z_loss_is_refused(getkey):
    with pytest.raises(ValueError, match=r"z_loss must be at least 0 .*, got -0\.1"):
        op(z_loss=-0.1)(*BY_NAME["tiny"].operands(getkey()))


def test_an_unknown_implementation_names_the_near_one():
    # Below the run-time check of types, which would refuse the name first.
    with pytest.raises(
        ValueError,
        match=r"implementation must be None or one of .*, got 'chunk'\. Did you mean 'chunked'",
    ):
        check_name("chunk", IMPLEMENTATIONS)
