"""What is frozen is an argument of the step: a teacher in a distillation loss, along every way that a step is run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.optim import mean_over_workers
from effscale.parallel import MeshConfig, per_worker, shard_batch, simulate_workers
from effscale.training import (
    Checkpoints,
    JsonlWriter,
    Loss,
    ShapeBuckets,
    StagedStep,
    Stages,
    abstract,
    create_train_state,
    evaluate,
    fit,
    make_eval_step,
    make_train_step,
    named_leaves,
    read_jsonl,
    resume_or_start,
)

SGD = optax.sgd(0.5)
RATE = 0.5


def distillation(model, batch, key, teacher):
    """KL divergence from the teacher, with a coefficient from the batch and one entry of a metric for each position."""
    student, target = (jax.nn.log_softmax(m(batch["input_ids"])) for m in (model, teacher))
    weights = batch["loss_weights"]
    each = (jnp.exp(target) * (target - student)).sum(-1) * weights
    metrics = {"by_position": each.sum(0)}
    return Loss(batch["coefficient"] * each.sum(), weights.sum(), metrics)


def model_of(toy, seed):
    return toy.Toy(rngs=nnx.Rngs(seed))


def state_of(toy, optimizer=SGD):
    return create_train_state(model_of(toy, 0), optimizer, key=jax.random.key(3))


def batches(toy):
    return [toy.batch_of(16, start) | {"coefficient": np.float32(0.3)} for start in (0, 50)]


@pytest.fixture(scope="module")
def expected(toy):
    """Two steps of plain gradient descent, with the teacher in a closure and none of the step's code."""
    teacher, model, rows = model_of(toy, 9), model_of(toy, 0), []

    @jax.jit
    def descend(model, batch):
        def mean(model):
            loss = distillation(model, batch, None, teacher)
            return loss.total / loss.weight, loss.metrics["by_position"] / loss.weight

        (loss, metric), gradient = jax.value_and_grad(mean, has_aux=True)(model)
        return jax.tree.map(lambda p, g: p - RATE * g, model, gradient), loss, metric

    for batch in batches(toy):
        model, loss, metric = descend(model, batch)
        rows.append((loss, metric))
    return model, rows


def pointers(tree):
    return [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
    ]


def check(run, teacher, expected):
    """Two steps give what is expected, and leave the teacher where it was, as it was."""
    before, values = pointers(teacher), jax.device_get(jax.tree.leaves(teacher))
    state, found = run()
    model, rows = expected
    for (loss, metric), metrics in zip(rows, found, strict=True):
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["by_position"], metric, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, jax.device_get(state.model), jax.device_get(model))
    assert pointers(teacher) == before
    for x, value in zip(jax.tree.leaves(teacher), values, strict=True):
        np.testing.assert_array_equal(x, value)


def two_steps(step, state, batches, frozen):
    found = []
    for batch in batches:
        state, metrics = step(state, batch, frozen=frozen)
        found.append(metrics)
    return state, found


def test_micro_batches_get_it_whole(toy, expected):
    step = jax.jit(make_train_step(distillation, SGD, accumulate=2), donate_argnums=0)
    teacher = model_of(toy, 9)
    check(lambda: two_steps(step, state_of(toy), batches(toy), teacher), teacher, expected)


def test_it_is_no_constant_of_the_program(toy):
    teacher, batch = model_of(toy, 9), batches(toy)[0]
    step = make_train_step(distillation, SGD)
    closure = make_train_step(lambda *args: distillation(*args, teacher), SGD)
    given = jax.jit(step).lower(state_of(toy), batch, frozen=teacher)
    closed = jax.jit(closure).lower(state_of(toy), batch)
    longest = lambda lowered: max(
        len(line) for line in lowered.as_text().splitlines() if "stablehlo.constant" in line
    )
    assert longest(given) < 200 < 1000 < longest(closed)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    taken = given.compile().memory_analysis().argument_size_in_bytes
    assert taken >= size(state_of(toy).model) + size(teacher) + batch["input_ids"].nbytes


def test_on_a_mesh_it_lies_as_it_was_placed(toy, expected):
    """A prepared program of ShapeBuckets refuses arguments that lie elsewhere than it was compiled for."""
    mesh = MeshConfig().build()
    everywhere = jax.NamedSharding(mesh, jax.P())
    teacher = jax.device_put(model_of(toy, 9), everywhere)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    teacher.embedding = teacher.embedding.replace(
        jax.device_put(teacher.embedding.get_value(), rows)
    )
    state = jax.device_put(state_of(toy), everywhere)
    placed = [shard_batch(batch, mesh) for batch in batches(toy)]
    buckets = ShapeBuckets(make_train_step(distillation, SGD, accumulate=2), donate_argnums=0)
    buckets.prepare(abstract(state), abstract(placed[0]), frozen=abstract(teacher))
    check(lambda: two_steps(buckets, state, placed, teacher), teacher, expected)
    assert buckets.num_compilations == 1
    assert teacher.embedding.get_value().sharding == rows


def test_every_stage_has_it(toy, expected):
    """Through ``fit``: the first stage cuts what has no weight, so that both give the whole batch's loss."""
    teacher = model_of(toy, 9)
    data = batches(toy)
    for batch in data:
        batch["loss_weights"] = batch["loss_weights"] * (np.arange(toy.LENGTH) < 4)
    plain = jax.jit(make_train_step(distillation, SGD))
    crop = lambda batch, length: {k: x[:, :length] if x.ndim else x for k, x in batch.items()}
    staged = StagedStep(make_train_step(distillation, SGD), Stages((0, 1), (4, toy.LENGTH)), crop)
    whole, metrics = two_steps(plain, state_of(toy), data, teacher)
    result = fit(
        state_of(toy),
        staged,
        iter(data),
        num_steps=2,
        frozen=teacher,
        before_step=staged.before_step,
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, result.state.model, whole.model)
    assert [len(record["by_position"]) for record in result.history] == [4, toy.LENGTH]
    close(result.history[1]["by_position"], metrics[1]["by_position"])
    assert [record.background for record in staged.compilations] == [False, True]


@pytest.mark.parametrize("simulated", [False, True])
def test_each_worker_has_it(toy, expected, simulated):
    optimizer = optax.chain(mean_over_workers("data"), SGD)
    step = make_train_step(distillation, optimizer, axis_name="data", accumulate=2)
    mesh = MeshConfig().build()
    teacher, state = model_of(toy, 9), None
    with jax.set_mesh(mesh):
        if simulated:
            step, data = jax.jit(simulate_workers(step, 8)), batches(toy)
            state = state_of(toy, optimizer)
        else:
            step = jax.jit(per_worker(step), donate_argnums=0)
            everywhere = jax.NamedSharding(mesh, jax.P())
            teacher, state = jax.device_put((teacher, state_of(toy, optimizer)), everywhere)
            data = [shard_batch(batch, mesh) for batch in batches(toy)]
        check(lambda: two_steps(step, state, data, teacher), teacher, expected)


class Positioned:
    """An endless iterator with a position."""

    def __init__(self, toy):
        self.batches, self.position = batches(toy), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return self.batches[self.position % 2]

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def test_a_run_with_a_teacher_resumes_exactly_and_saves_none_of_it(toy, tmp_path):
    teacher, optimizer = model_of(toy, 9), optax.adam(1e-2)
    step = ShapeBuckets(make_train_step(distillation, optimizer), donate_argnums=0)
    eval_step, held_out = jax.jit(make_eval_step(distillation)), batches(toy)
    create = lambda: state_of(toy, optimizer)

    def run(folder, num_steps):
        data = Positioned(toy)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state, start = resume_or_start(checkpoints, create, data)
            writer = JsonlWriter(folder / "metrics.jsonl", resume_step=start)
            report = lambda state: evaluate(
                state.model, eval_step, held_out, frozen=teacher, prefix="val_"
            )
            options = {"checkpoints": checkpoints, "writer": writer, "evaluate": report}
            result = fit(
                state, step, data, num_steps=num_steps, frozen=teacher, eval_every=2, **options
            )
            writer.close()
            return result

    whole, _, pieces = run(tmp_path / "whole", 4), run(tmp_path / "b", 2), run(tmp_path / "b", 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state.model, pieces.state.model)
    metrics = [tmp_path / folder / "metrics.jsonl" for folder in ("whole", "b")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()

    last = read_jsonl(metrics[0])[-1]
    sums = [distillation(whole.state.model, batch, None, teacher) for batch in held_out]
    by_position = sum(s.metrics["by_position"] for s in sums) / sum(s.weight for s in sums)
    np.testing.assert_allclose(last["val_by_position"], by_position, rtol=1e-5)
    assert step.num_compilations == 1

    saved = json.loads(next((tmp_path / "whole").rglob("step_*4/run/run.json")).read_text())
    own = named_leaves(dataclasses.replace(whole.state, model=None))
    assert set(saved["leaves"]["train"]) == {leaf.name for leaf in own}
    assert set(saved["leaves"]) == {"model", "train"}


def test_where_it_must_not_be(toy):
    """On the host, or on fewer devices than the state, it would be sent to them at every step."""
    options = {
        "step_fn": lambda state, batch, frozen: (state, {}),
        "data_iterator": iter([]),
        "num_steps": 1,
    }
    with pytest.raises(ValueError, match=r"blocks\.bias of frozen .* on the host.*device_put"):
        fit(state_of(toy), frozen=jax.device_get(model_of(toy, 9)), **options)
    state = jax.device_put(state_of(toy), jax.NamedSharding(MeshConfig().build(), jax.P()))
    with pytest.raises(ValueError, match=r"teacher\.blocks.* 1 of the state's 8 .*shard\("):
        fit(state, frozen={"teacher": model_of(toy, 9), "temperature": 2.0}, **options)


def test_it_is_given_by_its_name_only(toy):
    """As a third positional argument ``per_worker`` would take it for the batch, and divide it."""
    step = simulate_workers(make_train_step(distillation, SGD, axis_name="data"), 8)
    with pytest.raises(TypeError, match="positional arguments"):
        step(state_of(toy), batches(toy)[0], model_of(toy, 9).embedding)


def test_a_teacher_that_would_be_deleted_with_the_state_is_named(toy):
    state = state_of(toy)
    buckets = ShapeBuckets(make_train_step(distillation, SGD), donate_argnums=0)
    for _ in range(2):  # the second call is refused as well, and waits for nothing
        with pytest.raises(ValueError, match=r"frozen\.blocks\.bias.*donated.*jnp\.copy"):
            buckets(state, batches(toy)[0], frozen=state.model)
