"""Weights of which a part is masked, and rules of pruning on models."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.models import Dense, Transformer, add_lora, gpt2, matmul, num_params
from effscale.models.layers import Embedding
from effscale.parallel import MeshConfig, shard
from effscale.quant import (
    BitSchedule,
    Format,
    PruneRule,
    Pruning,
    Recipe,
    Rule,
    at_step,
    dequantize_model,
    fake_quantize,
    fake_quantize_model,
    merge_masks,
    prune_model,
    prune_weight,
    quantize_model,
    scheduled_step,
    top_k_mask,
)
from effscale.quant.packed import PackedWeight
from effscale.quant.pruning.weight import PrunedWeight
from effscale.training import (
    Checkpoints,
    Loss,
    create_train_state,
    make_train_step,
)

RNG = np.random.default_rng(0)
W = RNG.normal(size=(12, 6)).astype(np.float32)
B = RNG.normal(size=6).astype(np.float32)
X = RNG.normal(size=(5, 12)).astype(np.float32)
OF = {
    "sparse": Pruning(dense_ratio=0.4),
    "row": Pruning(structure="row", dense_ratio=0.4),
    "head": Pruning(structure="head", dense_ratio=0.4, num_heads=4),
}


def mask_in_numpy(w, pruning):
    """The kept parts of a kernel by their L1 norm, in the shape of the kernel."""
    size = np.abs(w)
    if pruning.structure == "row":
        size = np.broadcast_to(size.sum(0, keepdims=True), w.shape)
        units = w.shape[1]
    elif pruning.structure == "head":
        heads = size.reshape(pruning.num_heads, -1).sum(1)
        size = np.broadcast_to(heads.repeat(len(w) // pruning.num_heads)[:, None], w.shape)
        units = pruning.num_heads
    else:
        units = w.size
    least = np.sort(np.unique(size))[-math.ceil(pruning.dense_ratio * units)]
    return (size >= least).astype(np.float32)


@hypothesis.given(count=st.integers(1, 10**7), percent=st.integers(1, 100))
def test_how_many_are_kept(count, percent):
    """By the ratio as it is written: in floats 0.07 * 100 is more than 7."""
    kept = Pruning(dense_ratio=percent / 100).num_kept(count)
    assert kept == -(-percent * count // 100)


def test_scores_in_the_order_of_floats():
    """Zeros of either sign are equal, and an infinity is the highest."""
    scores = jnp.array([-0.0, 0.0, -1e-30, -jnp.inf, 1e-30, -0.0, jnp.inf, -3e38])
    kept = [np.flatnonzero(top_k_mask(scores, count)).tolist() for count in (1, 2, 4, 6, 7)]
    assert kept == [[6], [4, 6], [0, 1, 4, 6], [0, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6, 7]]


@hypothesis.given(
    scores=st.lists(st.integers(-3, 3), min_size=12, max_size=12), count=st.integers(1, 12)
)
def test_exactly_so_many_are_kept_whatever_ties_there_are(scores, count):
    mask = np.asarray(top_k_mask(jnp.array(scores, jnp.float32), count))
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert mask.sum() == count
    if count < 12:
        scores = np.array(scores)
        assert scores[mask == 1].min() >= scores[mask == 0].max()


@pytest.mark.parametrize("pruning", OF.values(), ids=OF)
@pytest.mark.parametrize("method", ["l1", "topk"])
def test_the_product(pruning, method):
    """Masked matrix and bias against NumPy; scores begin as what l1 goes by."""
    pruning = Pruning(**{**vars(pruning), "method": method})
    weight = prune_weight(jnp.asarray(W), pruning)
    mask = mask_in_numpy(W, pruning)
    np.testing.assert_array_equal(weight.dense(), W * mask)
    np.testing.assert_array_equal(weight.T.dense(), (W * mask).T)
    b = B * mask[0] if pruning.structure == "row" else B
    found = matmul(jnp.asarray(X), weight, jnp.asarray(B), "relu")
    np.testing.assert_allclose(found, np.maximum(X @ (W * mask) + b, 0), atol=1e-5)
    np.testing.assert_array_equal(weight.take(jnp.array([3, 0])), (W * mask)[[3, 0]])
    half = matmul(jnp.asarray(X, jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    # A stack is pruned matrix by matrix.
    stack = prune_weight(jnp.stack([jnp.asarray(W), -2 * jnp.asarray(W[::-1])]), pruning)
    masks = np.stack([mask, mask_in_numpy(W[::-1], pruning)])
    np.testing.assert_array_equal(stack.dense() != 0, masks == 1)


@pytest.mark.parametrize("pruning", OF.values(), ids=OF)
def test_gradients(pruning):
    """A score gets the gradient of its weights times the weights; a weight gets its own where it is kept."""
    pruning = Pruning(**{**vars(pruning), "method": "topk", "offset": 2})
    target = RNG.normal(size=(5, 6)).astype(np.float32)

    mask = mask_in_numpy(W, pruning)
    rows = pruning.structure == "row"
    for step, m in ((1, np.ones_like(mask)), (2, mask)):
        weight = at_step(prune_weight(jnp.asarray(W), pruning), step)
        found = jax.grad(loss_of, (0, 1))(weight.latent, weight.scores, weight, target)
        b = B * m[0] if rows else B
        error = X @ (W * m) + b - target
        of_w = X.T @ error
        np.testing.assert_allclose(found[0], of_w * m, rtol=1e-4, atol=1e-4)
        of_mask = of_w * W
        if rows:
            of_mask = of_mask.sum(0) + error.sum(0) * B
        if pruning.structure == "head":
            of_mask = of_mask.reshape(4, -1).sum(1)
        np.testing.assert_allclose(found[1], of_mask, rtol=1e-4, atol=1e-3)


def loss_of(latent, scores, weight, target):
    """The loss of a weight with another matrix and other scores."""
    weight = PrunedWeight(latent, None, scores, weight.step, weight.pruning)
    return 0.5 * jnp.square(matmul(jnp.asarray(X), weight, jnp.asarray(B)) - target).sum()


def test_a_mask_by_magnitude_is_made_at_the_offset():
    """Not from the weights that were there at first, as in DeepSpeed, and only once."""
    pruning = Pruning(dense_ratio=0.25, offset=10)
    weight = prune_weight(jnp.asarray(W), pruning)
    weight = at_step(weight, 9)
    np.testing.assert_array_equal(weight.dense(), W)
    with pytest.raises(
        ValueError, match="at step 9 it is not pruned yet; pruning begins at step 10"
    ):
        weight.check_finished()
    other = W[::-1, ::-1].copy()
    moved = PrunedWeight(jnp.asarray(other), weight.mask, None, weight.step, pruning)
    passed = jax.jit(at_step)(moved, 12)
    mask = mask_in_numpy(other, pruning)
    np.testing.assert_array_equal(passed.mask, mask == 1)
    later = PrunedWeight(jnp.asarray(W), passed.mask, None, passed.step, pruning)
    np.testing.assert_array_equal(at_step(later, 20).dense(), W * mask)


@pytest.mark.parametrize("method", ["l1", "topk"])
def test_training_finds_the_rows_that_matter(method):
    """Row 0 is the smallest at first, and the only one that the loss asks for: scores find it, a mask made at once does not."""
    kernel = jnp.full((4, 4), 0.5).at[:, 0].set(0.1)
    rule = PruneRule(
        where="kernel", pruning=Pruning(structure="row", dense_ratio=0.25, method=method)
    )
    layer = Dense(4, 4, rngs=nnx.Rngs(0))
    layer.kernel = layer.kernel.replace(kernel)
    optimizer = optax.sgd(0.05)
    state = create_train_state(prune_model(layer, (rule,)), optimizer, key=jax.random.key(0))

    def loss(model, x, key):
        wanted = jnp.zeros((x.shape[0], 4)).at[:, 0].set(2.0)
        return Loss(jnp.square(model(x) - wanted).sum(), jnp.float32(x.shape[0]))

    step = jax.jit(scheduled_step(make_train_step(loss, optimizer)))
    for _ in range(20):
        state, metrics = step(state, jnp.ones((4, 4)))
    kept = np.flatnonzero(state.model.kernel.get_value().kept())
    assert kept.tolist() == ([0] if method == "topk" else [1])
    assert (float(metrics["loss"]) < 0.1) == (method == "topk")


CONFIG = gpt2(num_layers=2, d_model=16, num_heads=4, d_ff=24, vocab_size=32, max_length=8)
IDS = jnp.asarray(RNG.integers(0, 32, (2, 8)), jnp.int32)
run = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model():
    """With biases that are not zero, so that it shows where they are masked."""
    made = Transformer(CONFIG, rngs=nnx.Rngs(0))
    noise = lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape)
    return jax.tree.map(noise, made)


def kernel_of(model, group, path):
    part = model.groups[group].blocks[0]
    for name in path.split("."):
        part = getattr(part, name)
    return part.kernel.get_value()


RULES = (
    PruneRule(where=r"layers\.0\..*up\.kernel", pruning=Pruning(structure="row", dense_ratio=0.25)),
    PruneRule(where=r"up\.kernel", pruning=Pruning(structure="row", dense_ratio=0.5)),
    PruneRule(where=r"attention\.out", pruning=Pruning(structure="head", dense_ratio=0.5)),
    PruneRule(where=r"(up|query)\.kernel", pruning=Pruning(dense_ratio=0.7)),
)


def test_rules_of_each_structure_decide_by_themselves(model):
    pruned = prune_model(model, RULES)
    assert [group.repeat for group in pruned.config.groups] == [1, 1]
    outer = kernel_of(pruned, 0, "feed_forward.up")
    # First each number, then rows of what is left.
    assert (outer.pruning.structure, outer.latent.pruning.structure) == ("row", "sparse")
    counts = [np.asarray(kernel_of(pruned, g, "feed_forward.up").mask).sum(-1) for g in (0, 1)]
    assert [count.tolist() for count in counts] == [[6], [12]]
    assert kernel_of(pruned, 1, "attention.out").pruning.num_heads == 4
    zeros = np.asarray(kernel_of(pruned, 1, "attention.query").dense() == 0).mean()
    assert zeros == pytest.approx(1 - math.ceil(0.7 * 256) / 256)
    merged = merge_masks(pruned)
    assert isinstance(kernel_of(merged, 0, "feed_forward.up"), jax.Array)
    for group in (0, 1):
        up = merged.groups[group].blocks[0].feed_forward.up
        weight = kernel_of(pruned, group, "feed_forward.up")
        np.testing.assert_array_equal(up.kernel.get_value(), weight.dense())
        np.testing.assert_array_equal(up.bias.get_value() != 0, weight.mask)
    assert num_params(merged.config) == num_params(model.config)


def test_masked_and_then_rounded(model):
    """In either order of calls; packed it computes the same, biases included."""
    four = Rule(
        where=r"layers\..*kernel",
        weights=Format(bits=4),
        activations=Format(granularity="token"),
        schedule=BitSchedule(start_bits=8, target_bits=4),
    )
    recipe = Recipe((four,))
    rules = RULES[1:3]
    fake = at_step(fake_quantize_model(prune_model(model, rules), recipe), 8)
    again = at_step(prune_model(fake_quantize_model(model, recipe), rules), 8)
    assert jax.tree.structure(fake) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, fake, again)
    weight = kernel_of(fake, 0, "feed_forward.up")
    np.testing.assert_array_equal(
        weight.dense(), fake_quantize(weight.latent.dense(), Format(bits=4))
    )
    expected = run(fake, IDS)
    plain = dequantize_model(fake)
    weight = plain.groups[0].blocks[0].feed_forward.up
    assert ((weight.kernel.get_value() == 0).all(1) == (weight.bias.get_value() == 0)).all()
    packed = quantize_model(fake, recipe)
    assert isinstance(kernel_of(packed, 0, "feed_forward.up"), PackedWeight)
    np.testing.assert_allclose(run(packed, IDS), expected, atol=2e-2 * jnp.abs(expected).max())
    straight = quantize_model(prune_model(model, rules), recipe)
    jax.tree.map(np.testing.assert_array_equal, straight, packed)


def test_a_pruned_model_is_sharded_and_checkpointed(model, tmp_path):
    """Scores and masks lie as the kernels that they are of."""
    topk = PruneRule(
        where="query", pruning=Pruning(structure="row", dense_ratio=0.5, method="topk", offset=3)
    )
    schedule = BitSchedule(start_bits=8, target_bits=4, offset=2)
    recipe = Recipe((Rule(where="query|up", weights=Format(bits=4), schedule=schedule),))
    pruned = at_step(fake_quantize_model(prune_model(model, (*RULES[1:], topk)), recipe), 3)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    placed = shard(pruned, mesh)
    inner = kernel_of(placed, 0, "attention.query").latent
    assert inner.scores.sharding.spec[-1] == inner.latent.latent.sharding.spec[-1] == "tensor"
    create = lambda: create_train_state(pruned, optax.adam(1e-3), key=jax.random.key(0))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, create(), force=True)
    restored = checkpoints.restore(jax.eval_shape(create)).state.model
    jax.tree.map(np.testing.assert_array_equal, restored, pruned)


def test_a_table_of_which_numbers_are_pruned():
    """Looked up and, as a tied head, multiplied by."""
    table = Embedding(10, 8, rngs=nnx.Rngs(0))
    pruned = prune_model(table, (PruneRule(where="embedding", pruning=Pruning(dense_ratio=0.3)),))
    dense = np.asarray(merge_masks(pruned).embedding.get_value())
    assert (dense != 0).sum() == 24
    np.testing.assert_array_equal(pruned(jnp.array([4, 9])), dense[[4, 9]])
    x = jnp.ones((2, 8))
    np.testing.assert_allclose(pruned.attend(x), np.ones((2, 8)) @ dense.T, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_ratio": 0.0}, r"Pruning\.dense_ratio must be above 0 and at most 1, got 0\.0"),
        ({"dense_ratio": float("nan")}, r"dense_ratio must be .*, got nan"),
        ({"structure": "rows"}, r"Pruning\.structure must be .*, got 'rows'; did you mean 'row'"),
        ({"method": "snip_momentum"}, r"Pruning\.method must be .*, got 'snip_momentum'"),
        ({"num_heads": 4}, r"num_heads must be None unless structure='head', got 4"),
        ({"structure": "head", "num_heads": 0}, r"num_heads must be .*, got 0"),
        ({"offset": -1}, r"offset must be .*, got -1"),
    ],
    ids=str,
)
def test_impossible_pruning(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Pruning(**{"dense_ratio": 0.5, **fields})


def test_what_cannot_be_pruned(model):
    row, sparse = OF["row"], OF["sparse"]
    rule = lambda where, pruning: (PruneRule(where=where, pruning=pruning),)
    binary = Recipe((Rule(where=r"layers\..*up\.kernel", weights=Format(bits=1)),))
    up = rule(r"up\.kernel", sparse)
    pruned = prune_model(model, up)
    cases = {
        r"feed_forward\.up\.kernel: it already has a sparse mask": lambda: prune_model(pruned, up),
        "up.kernel: it is pruned, and binary codes have no zero": lambda: fake_quantize_model(
            pruned, binary
        ),
        "up.kernel: it is binary": lambda: prune_model(fake_quantize_model(model, binary), up),
        "embedding: structure='row' can only prune kernels": lambda: prune_model(
            model, rule("tokens.embedding", row)
        ),
        r"query\.kernel: structure='head' can only prune layers\.\*\.attention\.out\.kernel": lambda: (
            prune_model(model, rule("query", OF["head"]))
        ),
        "out.kernel: num_heads must be the model's 4 or None, got 3": lambda: prune_model(
            model, rule("attention.out", Pruning(structure="head", dense_ratio=0.5, num_heads=3))
        ),
        "where='up|nothing': the alternative 'nothing'": lambda: prune_model(
            model, rule("up|nothing", row)
        ),
        "up.kernel: it has a LoRA pair": lambda: prune_model(
            add_lora(model, rank=2, key=jax.random.key(0)), up
        ),
        "up.kernel: a PackedWeight cannot be pruned": lambda: prune_model(
            quantize_model(model, Recipe((Rule(where=r"up\.kernel", weights=Format()),))), up
        ),
        "num_heads must be set, got None": lambda: prune_weight(
            jnp.ones((4, 4)), Pruning(structure="head", dense_ratio=0.5)
        ),
        "num_heads must divide the number of inputs, 6, got 4": lambda: prune_weight(
            jnp.ones((6, 4)), OF["head"]
        ),
        "only matrices can be pruned": lambda: prune_weight(jnp.ones(6), sparse),
        r"up\.kernel: at step 0 it is not pruned yet": lambda: merge_masks(
            prune_model(model, rule(r"up\.kernel", Pruning(dense_ratio=0.5, offset=5)))
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message.replace("|nothing'", r"\|nothing'")):
            call()
