"""One-stage distillation: layer maps, the loss of plain arrays, and the objective of models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import ClassHead, Transformer, bert, by_layer, gpt2, take_layers
from effscale.quant import (
    DistillationOutputs,
    LayerMap,
    distillation_loss,
    fake_quantize_model,
    one_stage_loss,
    quantize_model,
    w1a8,
    w2a8,
)
from effscale.training import AdamWConfig, create_train_state, make_train_step


@pytest.mark.parametrize(
    ("layers", "scores", "hidden"),
    [
        # The papers' choices out of 12 layers; with the second the embedding learns what the teacher's layer 0 gives.
        ([1, 3, 5, 7, 9, 11], (1, 3, 5, 7, 9, 11), (0, 2, 4, 6, 8, 10, 12)),
        ([2, 4, 6, 8, 10], (2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)),
        ([1, 3, 5], (1, 3, 5), (0, 2, 4, 6)),
        ([0, 4], (0, 4), (0, 1, 5)),  # the original's index would be -1: the last state
    ],
)
def test_the_map_of_a_reduced_student(layers, scores, hidden):
    assert LayerMap.reduced(layers) == LayerMap(scores, hidden)


def test_the_map_of_a_student_that_is_spread_evenly():
    assert LayerMap.even(6, 12) == LayerMap.reduced([1, 3, 5, 7, 9, 11])
    assert LayerMap.even(4, 12) == LayerMap((2, 5, 8, 11), (0, 3, 6, 9, 12))
    assert LayerMap.even(3, 3) == LayerMap((0, 1, 2), (0, 1, 2, 3))


def some_outputs(seed, layers, classes=3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return DistillationOutputs(
        draw(2, classes), draw(layers, 2, 4, 5, 5), draw(layers + 1, 2, 5, 8)
    )


def as_in_the_original(student, teacher, layers):
    """DeepSpeed's one_stage: three means over everything, in float64."""
    s, t = jax.tree.map(np.float64, (student, teacher))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    mse = lambda a, b: ((a - b) ** 2).mean()
    logits = (-softmax(t.logits) * np.log(softmax(s.logits))).mean()
    scores = sum(mse(s.scores[i], t.scores[n]) for i, n in enumerate(layers.scores))
    hidden = sum(mse(s.hidden[i], t.hidden[n]) for i, n in enumerate(layers.hidden))
    return logits, scores, hidden


def on_device(outputs):
    return jax.tree.map(jnp.asarray, outputs)


@pytest.mark.parametrize("layers", [LayerMap.reduced([2, 4]), LayerMap.even(2, 6)])
def test_the_loss_is_the_original_s(layers):
    student, teacher = some_outputs(0, 2), some_outputs(1, 6)
    terms = distillation_loss(on_device(student), on_device(teacher), layers)
    wanted = as_in_the_original(student, teacher, layers)
    np.testing.assert_allclose([term.mean() for term in terms], wanted, rtol=1e-5)
    np.testing.assert_allclose(terms.total().mean(), sum(wanted), rtol=1e-5)
    apart = lambda outputs: DistillationOutputs(outputs[0], [*outputs[1]], tuple(outputs[2]))
    listed = distillation_loss(apart(on_device(student)), apart(on_device(teacher)), layers)
    np.testing.assert_array_equal(listed.total(), terms.total())


def test_equal_logits_of_three_classes_cost_a_third_of_their_entropy():
    """The original averages over classes, too."""
    nothing = DistillationOutputs(jnp.zeros((1, 3)), jnp.zeros((1, 1, 1, 2, 2)), jnp.zeros((2, 1, 2, 4)))  # fmt: skip
    terms = distillation_loss(nothing, nothing, LayerMap.even(1, 1))
    np.testing.assert_allclose(terms.total(), np.log(3) / 3, rtol=1e-6)
    words = nothing._replace(logits=jnp.zeros((1, 2, 3)))
    assert float(distillation_loss(words, words, LayerMap.even(1, 1)).logits[0]) == pytest.approx(
        np.log(3)
    )


def test_a_single_logit_is_a_regression():
    one, other = some_outputs(0, 1, classes=1), some_outputs(1, 1, classes=1)
    terms = distillation_loss(on_device(one), on_device(other), LayerMap.even(1, 1))
    np.testing.assert_allclose(terms.logits, (one.logits - other.logits)[:, 0] ** 2, rtol=1e-5)


def test_masked_scores_count_as_zeros():
    """A mask of -10000 that was added to both leaves the padded keys' own scores out, up to what it rounds away."""
    student, teacher = some_outputs(0, 1), some_outputs(1, 1)
    mask = np.zeros((1, 2, 1, 1, 5), np.float32)
    mask[:, 1, ..., 3:] = -1e4
    masked = lambda o: o._replace(scores=o.scores + mask)
    zeroed = lambda o: o._replace(scores=np.where(mask < 0, 0, o.scores))
    layers = LayerMap.even(1, 1)
    found = distillation_loss(on_device(masked(student)), on_device(masked(teacher)), layers)
    wanted = as_in_the_original(zeroed(student), zeroed(teacher), layers)
    np.testing.assert_allclose([term.mean() for term in found], wanted, rtol=1e-5)


def test_a_padded_row_has_the_loss_of_the_row_without_padding():
    student, teacher = some_outputs(0, 2), some_outputs(1, 2)
    layers = LayerMap.even(2, 2)
    real = jnp.arange(5)[None] < jnp.array([[5], [3]])
    causal = jnp.tri(5, dtype=bool)[None]
    found = distillation_loss(
        on_device(student), on_device(teacher), layers, real=real, visible=causal
    )
    short = lambda o: DistillationOutputs(o.logits[1:], o.scores[:, 1:, :, :3, :3], o.hidden[:, 1:, :3])  # fmt: skip
    alone = distillation_loss(
        on_device(short(student)), on_device(short(teacher)), layers, visible=causal[:, :3, :3]
    )
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one[1:], other, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": np.zeros((3, 2, 4, 5, 5))},
            r"layers\.scores must have one entry for each of the student's 3 scores, got 2: \(1, 3\)",
        ),
        (
            {"hidden": np.zeros((2, 2, 5, 8))},
            r"layers\.hidden must have one entry for each of the student's 2 hidden, got 3",
        ),
        (
            {"hidden": np.zeros((3, 2, 5, 4))},
            r"hidden: entry 0 of the student has shape \(2, 5, 4\)",
        ),
        ({"scores": np.zeros((2, 2, 2, 5, 5))}, "same width and number of heads"),
        ({"logits": np.zeros((2, 5))}, r"logits of the same shape, got \(2, 5\) and \(2, 3\)"),
    ],
)
def test_outputs_that_do_not_fit(change, message):
    change = {name: value.astype(np.float32) for name, value in change.items()}
    student = some_outputs(0, 2)._replace(**change)
    with pytest.raises(ValueError, match=message):
        distillation_loss(on_device(student), on_device(some_outputs(1, 4)), LayerMap.even(2, 4))


def test_maps_that_are_none():
    with pytest.raises(
        ValueError, match=r"layers\.scores must be from 0 to 1, as the teacher has 2 scores"
    ):
        distillation_loss(
            on_device(some_outputs(0, 2)), on_device(some_outputs(1, 2)), LayerMap.even(2, 4)
        )
    with pytest.raises(ValueError, match="must divide the teacher's, got 4 and 6"):
        LayerMap.even(4, 6)
    with pytest.raises(ValueError, match="teacher_layers must name at least one layer"):
        LayerMap.reduced([])
    with pytest.raises(
        ValueError,
        match=r"LayerMap\.scores\[0\] must be at least 0, got -1",
    ):
        LayerMap((-1,), (0, 1))
    with pytest.raises(ValueError, match="hidden must be one entry more"):
        LayerMap((1,), (0,))


def small(family, layers=4):
    """A teacher with weights as large as trained ones, so that layers do something."""
    sizes = {"num_layers": layers, "d_model": 16, "num_heads": 2, "vocab_size": 64}
    config = family(**sizes, max_length=16)
    if family is bert:
        head = ClassHead(num_classes=3, pool="mean")
        config = dataclasses.replace(config, heads=(head,), pooler=False)
    scale = lambda x: x * 8 if x.ndim == 3 else x
    return jax.tree.map(scale, Transformer(config, rngs=nnx.Rngs(0)))


def some_batch(rows=4):
    rng = np.random.default_rng(0)
    mask = np.ones((rows, 16), np.int32)
    mask[0, 11:] = mask[2, 6:] = 0
    ids = rng.integers(0, 64, (rows, 16)).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


@pytest.fixture(scope="module", params=[bert, gpt2], ids=["bert", "gpt2"])
def pair(request):
    teacher = small(request.param)
    return teacher, take_layers(teacher, [1, 3]), LayerMap.reduced([1, 3])


def test_the_objective_of_models_is_the_loss_of_what_they_compute(pair):
    """Causal and padded positions left out, by a reference that cuts them away row by row."""
    teacher, student, layers = pair
    batch = some_batch()
    objective = jax.jit(functools.partial(one_stage_loss, layers=layers))
    loss = objective(student, batch, None, teacher)
    assert float(loss.weight) == 4
    # Rows weigh the same in any micro-batch, whatever their lengths, and not at all if they are told so.
    half = dict(batch, weights=jnp.array([1, 0, 1, 0]))
    other = dict(batch, weights=jnp.array([0, 1, 0, 1]))
    parts = [objective(student, part, None, teacher) for part in (half, other)]
    np.testing.assert_allclose(sum(part.total for part in parts), loss.total, rtol=1e-5)
    assert float(parts[0].weight) == 2

    @jax.jit
    def outputs(model):
        given = {"attention_mask": batch["attention_mask"]}
        capture = ("layer_in", "layer_out", "attention_scores")
        encoded = model.encode(batch["input_ids"], **given, capture=capture)
        layer = lambda name: by_layer(encoded.captured, name)
        hidden = jnp.concatenate([layer("layer_in")[:1], layer("layer_out")])
        found = model(batch["input_ids"], **given)
        logits = found if isinstance(found, jax.Array) else found["classes"]
        return DistillationOutputs(logits, layer("attention_scores"), hidden)

    own, other = (jax.tree.map(np.float64, outputs(model)) for model in (student, teacher))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    total = np.zeros(3)
    for row, length in enumerate(np.asarray(batch["attention_mask"]).sum(1)):
        seen = np.tri(length, dtype=bool) if teacher.config.causal else np.ones((length,) * 2, bool)
        entropy = (-softmax(other.logits[row]) * np.log(softmax(own.logits[row]))).sum(-1)
        total[0] += entropy[:length].mean() if entropy.ndim else entropy / 3
        for i, n in enumerate(layers.scores):
            gaps = own.scores[i, row] - other.scores[n, row]
            total[1] += (gaps[:, :length, :length][:, seen] ** 2).mean()
        for i, n in enumerate(layers.hidden):
            total[2] += ((own.hidden[i, row] - other.hidden[n, row])[:length] ** 2).mean()
    found = [loss.metrics[f"{name}_loss"] for name in ("logits", "scores", "hidden")]
    np.testing.assert_allclose(found, total, rtol=2e-4)
    np.testing.assert_allclose(loss.total, total.sum(), rtol=2e-4)
    assert min(total) > 0


def test_a_student_like_its_teacher_has_nothing_to_learn(pair):
    teacher, _, _ = pair
    layers, batch = LayerMap.even(4, 4), some_batch()

    @jax.jit
    def gradients(student, teacher):
        total = lambda s, t: one_stage_loss(s, batch, None, t, layers=layers).total
        return jax.grad(total, argnums=(0, 1), allow_int=True)(student, teacher)

    of_student, of_teacher = gradients(teacher, teacher)
    assert all(np.abs(leaf).max() < 1e-4 for leaf in jax.tree.leaves(of_student))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


@pytest.mark.parametrize(
    "family", [bert, pytest.param(gpt2, marks=pytest.mark.slow)]
)  # the loss is tested with both
def test_a_ternary_student_learns_with_its_teacher_in_the_frozen_place(family):
    """And packed it does what it has learned."""
    teacher, batch = small(family), some_batch()
    loss = functools.partial(one_stage_loss, layers=LayerMap.reduced([1, 3]))
    optimizer = AdamWConfig().build(3e-3)
    fake = fake_quantize_model(take_layers(teacher, [1, 3]), w2a8())
    state = create_train_state(fake, optimizer, key=jax.random.key(0))
    step, gaps = jax.jit(make_train_step(loss, optimizer)), []
    for _ in range(25):
        state, metrics = step(state, batch, frozen=teacher)
        gaps.append(float(metrics["scores_loss"] + metrics["hidden_loss"]))
    assert gaps[-1] < 0.5 * gaps[0]
    run = jax.jit(lambda model: model.encode(inputs=batch["input_ids"]).hidden)
    exact, packed = run(state.model), run(quantize_model(state.model, w2a8()))
    assert jnp.linalg.norm(packed - exact) < 0.05 * jnp.linalg.norm(exact)


def test_models_that_do_not_fit_say_so(pair):
    teacher, student, layers = pair

    def traced(student, layers, head=None):
        loss = functools.partial(one_stage_loss, layers=layers, head=head)
        return jax.eval_shape(loss, student, some_batch(), None, teacher)

    with pytest.raises(
        ValueError, match=r"head must be one of .*, the heads of the student, got 'value'"
    ):
        traced(student, layers, "value")
    with pytest.raises(ValueError, match="the student's 2 scores, got 3"):
        traced(student, LayerMap.reduced([0, 1, 3]))
    headless = jax.tree.map(lambda leaf: leaf, student)
    headless.heads = nnx.Dict({})
    with pytest.raises(
        ValueError, match=r"head must be one of .*, the heads of the student, got None"
    ):
        traced(headless, layers)


def test_it_is_what_pytorch_computes():
    """The original's own lines, on transformers' BERT, whose scores are taken from its queries and keys."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import tempfile

    from effscale.interop import load_pretrained

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    shown, ids = {}, some_batch()["input_ids"]
    for name, count in (("student", 2), ("teacher", 4)):
        config = transformers.BertConfig(
            vocab_size=64,
            num_hidden_layers=count,
            max_position_embeddings=16,
            num_labels=3,
            initializer_range=0.2,
            **sizes,
        )
        model = transformers.BertForSequenceClassification(config).eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            out = model(torch.from_numpy(np.array(ids, np.int64)), output_hidden_states=True)
            scores = []
            for layer, x in zip(model.bert.encoder.layer, out.hidden_states, strict=False):
                heads = lambda y: y.unflatten(-1, (2, 8)).transpose(1, 2)
                attention = layer.attention.self
                query, keys = heads(attention.query(x)), heads(attention.key(x))
                scores.append(query @ keys.mT / 8**0.5)
            shown[name] = load_pretrained(folder), out.logits, scores, out.hidden_states
    layers = LayerMap.reduced([1, 3])
    mse = torch.nn.MSELoss()
    (student, logits, scores, hidden), (teacher, wanted, their_scores, their_hidden) = (
        shown["student"],
        shown["teacher"],
    )
    total = (-wanted.softmax(-1) * logits.log_softmax(-1)).mean()
    total = total + sum(mse(scores[i], their_scores[n]) for i, n in enumerate(layers.scores))
    total = total + sum(mse(hidden[i], their_hidden[n]) for i, n in enumerate(layers.hidden))
    objective = jax.jit(functools.partial(one_stage_loss, layers=layers))
    loss = objective(student, {"input_ids": ids}, None, teacher)
    assert float(loss.mean()) == pytest.approx(float(total), rel=1e-4)


def test_rows_of_a_fake_quantized_table_are_those_of_the_whole(pair):
    """Only the rows that are looked up are rounded, and gradients are the same."""
    teacher, _, _ = pair
    fake = fake_quantize_model(teacher, w1a8())
    table = fake.embed.tokens.embedding.get_value()
    ids = jnp.array([[3, 60, 3]], jnp.int32)
    whole = lambda latent: dataclasses.replace(table, latent=latent).dense()[ids]
    rows = lambda latent: dataclasses.replace(table, latent=latent).take(ids)
    np.testing.assert_allclose(rows(table.latent), whole(table.latent), rtol=1e-6)
    weigh = lambda f: lambda latent: (f(latent) * jnp.arange(48.0).reshape(1, 3, 16)).sum()
    one, other = (jax.grad(weigh(f))(table.latent) for f in (rows, whole))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.flatnonzero(np.abs(one).sum(1)).tolist() == [3, 60]
