import dataclasses
import logging
import pathlib
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.training import (
    AdamWConfig,
    CheckpointError,
    Checkpoints,
    RunFolder,
    abstract,
    create_train_state,
    make_train_step,
    read_checkpoint_config,
    restore_model,
    resume_or_start,
)
from effscale.training.checkpoint_files import step_folder
from effscale.training.state import ema_model

OPTIMIZER = AdamWConfig().build(1e-2)


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    seed: int = 0
    num_steps: int = 100


def fresh(toy, seed=0, **options):
    return create_train_state(
        toy.Toy(rngs=nnx.Rngs(seed)), OPTIMIZER, key=jax.random.key(seed), **options
    )


@pytest.fixture(scope="module")
def trained(toy):
    """A state and the iterator after three steps."""
    step = jax.jit(make_train_step(toy.loss_fn, OPTIMIZER, ema_decay=0.5))
    state, data = fresh(toy, ema=True), toy.batches()
    for _ in range(3):
        state, _ = step(state, next(data))
    return state, data


def content(tree):
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(keys(leaf)) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(content(a), content(b), strict=True):
        np.testing.assert_array_equal(x, y)


def data_files(folder, step):
    files = [path for path in step_folder(folder, step).rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back(toy, trained, tmp_path, asynchronous):
    state, data = trained
    position = data.get_state()
    with Checkpoints(tmp_path, config=Config(), asynchronous=asynchronous) as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.save(3, state, data, force=True)
        assert not checkpoints.save(3, state, data, force=True)  # it is there already
    other = toy.batches()
    restored = Checkpoints(tmp_path, config=Config()).restore(
        jax.eval_shape(lambda: fresh(toy, ema=True)), other
    )
    equal(restored.state, state)
    assert (restored.step, restored.skipped) == (3, [])
    assert other.get_state() == position
    jax.tree.map(np.testing.assert_array_equal, next(other), next(toy.batches_at(position)))


def test_a_donated_state_is_saved_as_it_was(toy, tmp_path):
    """The next step overwrites the buffers while the checkpoint is still being written."""
    large = jnp.arange(3_000_000, dtype=jnp.float32)
    state = dataclasses.replace(fresh(toy), opt_state={"large": large})
    expected = np.array(large)
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda x: x if x.ndim != 1 else x * 0 - 1, state),
        donate_argnums=0,
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, force=True)
        state = jax.block_until_ready(overwrite(state))
    assert float(state.opt_state["large"][7]) == -1
    restored = Checkpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(restored.state.opt_state["large"], expected)


def test_every_and_keep(toy, tmp_path):
    state = fresh(toy)
    with Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
        saved = [checkpoints.save(step, state) for step in range(1, 8)]
        checkpoints.save(7, state, force=True)
    assert saved == [False, True, False, True, False, True, False]
    assert Checkpoints(tmp_path).steps == [6, 7]
    assert Checkpoints(tmp_path).latest == 7


def save_three(toy, folder):
    with Checkpoints(folder, every=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, fresh(toy, seed=step))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes instead of"),
        (flip, "has changed"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(toy, tmp_path, caplog, damage, reason):
    save_three(toy, tmp_path)
    # The smallest file in one, the array data in the other.
    damage(next(path for path in data_files(tmp_path, 3) if path.stat().st_size))
    damage(data_files(tmp_path, 2)[-1])
    checkpoints = Checkpoints(tmp_path, every=1)
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.restore(fresh(toy))
    assert restored.step == 1
    equal(restored.state, fresh(toy, seed=1))
    assert [step for step, _ in restored.skipped] == [3, 2]
    assert all(reason in text for _, text in restored.skipped)
    assert "step 3 is damaged" in caplog.text
    # Going on writes these steps anew; the damaged ones are kept aside.
    checkpoints.save(2, fresh(toy, seed=9))
    checkpoints.close()
    assert checkpoints.steps == [1, 2]
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == [
        "step_00000002.0",
        "step_00000003.0",
    ]
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy, seed=9))


def test_if_all_are_damaged_the_run_does_not_start_over(toy, tmp_path):
    save_three(toy, tmp_path)
    for step in (1, 2, 3):
        truncate(data_files(tmp_path, step)[-1])
    with pytest.raises(
        CheckpointError, match=r"step 3: .*step 2: .*step 1: .*to start a new run, .*move this one"
    ):
        Checkpoints(tmp_path).restore(fresh(toy))


def test_a_step_can_be_chosen(toy, tmp_path):
    save_three(toy, tmp_path)
    equal(Checkpoints(tmp_path).restore(fresh(toy), step=2).state, fresh(toy, seed=2))
    with pytest.raises(FileNotFoundError, match=r"step 5; available steps: 1, 2, 3"):
        Checkpoints(tmp_path).restore(fresh(toy), step=5)


def test_a_step_of_another_run_is_never_overwritten(toy, tmp_path):
    save_three(toy, tmp_path)
    another = Checkpoints(tmp_path)
    for step in (
        2,
        3,
    ):  # a checkpoint of step 2 would be taken for an older one than that of step 3
        with pytest.raises(
            CheckpointError, match=rf"contains the checkpoint.* step {step} is not .*another folder"
        ):
            another.save(step, fresh(toy, seed=9), force=True)
    assert Checkpoints(tmp_path).steps == [1, 2, 3]
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy, seed=3))
    # Later steps can be added.
    assert another.save(4, fresh(toy, seed=4), force=True)
    another.close()
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy, seed=4))


def test_a_run_can_go_back_while_it_is_under_way(toy, tmp_path):
    with Checkpoints(tmp_path, every=1, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, fresh(toy, seed=step))
        assert checkpoints.restore(fresh(toy), step=1).step == 1
        assert checkpoints.save(2, fresh(toy, seed=9))
    assert checkpoints.steps == [1, 2]
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy, seed=9))
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == [
        "step_00000002.0",
        "step_00000003.0",
    ]


def test_where_all_manifests_are_lost_nothing_is_deleted_and_the_run_stops(toy, tmp_path):
    save_three(toy, tmp_path)
    for step in (1, 2, 3):
        (step_folder(tmp_path, step) / "manifest.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    create = lambda: fresh(toy)
    for read in (
        lambda: resume_or_start(Checkpoints(tmp_path), create),
        lambda: resume_or_start(Checkpoints(tmp_path), create, resume=False),
        lambda: restore_model(tmp_path, create().model),
    ):
        with pytest.raises(CheckpointError, match=r"step_00000003.*manifest|already contains"):
            read()
    with pytest.raises(
        FileNotFoundError, match=r"step 2 .one without its manifest.*available steps: none"
    ):
        Checkpoints(tmp_path).restore(create(), step=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_before_its_first_manifest_starts_again(toy, tmp_path, monkeypatch):
    def killed(path, known):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("effscale.training.checkpoint.write_manifest", killed)
        patch.setattr("threading.excepthook", lambda arguments: None)
        Checkpoints(tmp_path).save(1, fresh(toy), force=True)
        while any(thread.name == "checkpoint-1" for thread in threading.enumerate()):
            time.sleep(0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000001.writing"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(fresh(toy)) is None
        checkpoints.save(1, fresh(toy), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_one_that_cannot_be_deleted_does_not_stop_the_run(toy, tmp_path, caplog, monkeypatch):
    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr("effscale.training.checkpoint.delete_checkpoint", refuse)
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, fresh(toy, seed=step))
    assert "step 1 could not be deleted: not yours" in caplog.text
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy, seed=2))


def test_urls_are_refused(toy, tmp_path, monkeypatch):
    """But for gs://, see test_bucket_checkpoints.py."""
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: Checkpoints("s3://bucket/run"),
        lambda: Checkpoints(pathlib.Path("s3://bucket/run")),
        lambda: restore_model("hdfs://host/run", fresh(toy).model),
    ):
        with pytest.raises(
            ValueError, match=r"local folder or gs://.*got '\w+://?\w+/run'.*RunMirror"
        ):
            use()
    for use in (
        lambda: RunFolder.create("gs://bucket/run"),
        lambda: RunFolder.create(name="a", root="s3://bucket/run"),
    ):
        with pytest.raises(ValueError, match=r"'\w+://bucket/run' must be a local path.*mirror="):
            use()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_ones_are_passed_over_then_put_aside_or_deleted(toy, tmp_path, caplog):
    save_three(toy, tmp_path)
    (step_folder(tmp_path, 3) / "manifest.json").unlink()
    (tmp_path / "step_00000004.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, every=1)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore(fresh(toy)).step == 2
    assert "was not finished" in caplog.text
    assert len(list(tmp_path.iterdir())) == 4  # reading changes nothing
    checkpoints.save(5, fresh(toy))
    checkpoints.close()
    # Arrays without checksums may be all that is left of something, and are not deleted.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "set_aside",
        "step_00000001",
        "step_00000002",
        "step_00000005",
    ]
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["step_00000003.0"]


def test_another_config_is_refused_by_field(toy, tmp_path):
    with Checkpoints(tmp_path, config={"model": Config(), "data": "a"}) as checkpoints:
        checkpoints.save(1, fresh(toy), force=True)
    other = {"model": Config(width=16, num_steps=200), "data": "a"}
    with pytest.raises(CheckpointError, match=r"model\.width: 8 in the checkpoint, 16 in this run"):
        Checkpoints(tmp_path, config=other, free_fields=["model.num_steps"]).restore(fresh(toy))
    longer = {"model": Config(num_steps=200), "data": "a"}
    with pytest.raises(
        CheckpointError, match=r"model\.num_steps: 100 in the checkpoint, 200 in this run"
    ):
        Checkpoints(tmp_path, config=longer).restore(fresh(toy))
    assert (
        Checkpoints(tmp_path, config=longer, free_fields=["model.num_steps"])
        .restore(fresh(toy))
        .step
        == 1
    )
    assert read_checkpoint_config(tmp_path) == {
        "model": {"width": 8, "seed": 0, "num_steps": 100},
        "data": "a",
    }


def test_another_model_or_optimizer_is_refused_by_leaf(toy, trained, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, fresh(toy), force=True)
    narrow = jax.tree.map(lambda x: x[..., :4] if x.ndim else x, fresh(toy).model)
    with pytest.raises(
        CheckpointError, match=r"model: embedding is saved as .*16, 8.*, requested as .*16, 4"
    ):
        Checkpoints(tmp_path).restore(dataclasses.replace(fresh(toy), model=narrow))
    plain = create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optax.sgd(0.1), key=jax.random.key(0))
    with pytest.raises(
        CheckpointError, match=r"opt_state\.0\.mu\.blocks\.bias is saved but not requested"
    ):
        Checkpoints(tmp_path).restore(plain)
    with pytest.raises(CheckpointError, match="has no 'ema'"):
        Checkpoints(tmp_path).restore(trained[0])


def test_positions_of_other_processes_are_taken_where_they_agree(
    toy, trained, tmp_path, monkeypatch
):
    state, data = trained
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, force=True)
    with pytest.raises(
        CheckpointError, match=r"no data position for process 0 of 1 \(it has: none"
    ):
        Checkpoints(tmp_path).restore(state, data)

    position = data.get_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, data, force=True)
    module = "effscale.training.checkpoint"
    monkeypatch.setattr(f"{module}._iterator_file", lambda: "process_3-of-4.json")
    fresh_data = toy.batches()
    Checkpoints(tmp_path).restore(state, fresh_data)
    assert fresh_data.get_state() == position

    other = next(tmp_path.glob("*2/iterator")) / "process_1-of-2.json"
    other.write_text('{"json": {"position": 17}}')
    with pytest.raises(CheckpointError, match="process_0-of-1, process_1-of-2, which differ"):
        Checkpoints(tmp_path).restore(state, fresh_data)


def test_a_checkpoint_of_one_mesh_resumes_on_another(toy, tmp_path):
    auto = jax.sharding.AxisType.Auto
    first = jax.make_mesh((8,), ("data",), axis_types=(auto,))
    second = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(auto, auto))
    state = fresh(toy)
    split = jax.device_put(state.model, jax.NamedSharding(first, jax.P()))
    split.embedding = split.embedding.replace(
        jax.device_put(split.embedding.get_value(), jax.NamedSharding(first, jax.P("data")))
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, dataclasses.replace(state, model=split), force=True)

    def place(leaf):
        spec = jax.P(None, "tensor") if leaf.shape == (toy.VOCABULARY, toy.WIDTH) else jax.P()
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(second, spec)
        )

    restored = Checkpoints(tmp_path).restore(jax.tree.map(place, state)).state
    equal(restored, state)
    assert restored.model.embedding.get_value().sharding.spec == jax.P(None, "tensor")
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(restored))


def test_a_model_is_read_alone(toy, trained, tmp_path):
    state, _ = trained
    run = tmp_path / "run"
    with Checkpoints(run / "checkpoints", config=Config()) as checkpoints:
        checkpoints.save(3, state, force=True)
    wanted = jax.eval_shape(lambda: toy.Toy(rngs=nnx.Rngs(0)))
    model, step = restore_model(run, wanted)
    assert step == 3
    equal(model, state.model)
    average, _ = restore_model(run, abstract(state.model), ema=True)
    equal(average, ema_model(state))
    assert read_checkpoint_config(run)["width"] == 8
    with pytest.raises(FileNotFoundError, match="no checkpoint found"):
        read_checkpoint_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4; available steps: 3"):
        restore_model(run, wanted, step=4)
    truncate(data_files(run / "checkpoints", 3)[-1])
    with pytest.raises(CheckpointError, match="step 3"):
        restore_model(run, wanted)


def test_a_model_without_average_says_so(toy, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, fresh(toy), force=True)
    with pytest.raises(CheckpointError, match="no moving average"):
        restore_model(tmp_path, fresh(toy).model, ema=True)


def test_frozen_integers_bits_and_empty_arrays(tmp_path, toy):
    model = {
        "packed": jnp.arange(4, dtype=jnp.int8).astype(jnp.int4),
        "bits": jnp.arange(3, dtype=jnp.uint8),
        "half": jnp.ones(3, jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "kernel": jnp.ones((2, 2)),
    }
    state = create_train_state(model, OPTIMIZER, key=jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, force=True)
    restored = Checkpoints(tmp_path).restore(abstract(state)).state
    equal(restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_an_error_and_the_previous_checkpoint_stays(toy, tmp_path, asynchronous):
    """A limit on the size of files stands in for the disk: the same error of the same system call."""
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, fresh(toy), force=True)
    checkpoints.wait()
    random = jax.random.normal(jax.random.key(0), (200_000,))
    large = dataclasses.replace(fresh(toy), opt_state={"large": random})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:

        def save():
            checkpoints.save(2, large, force=True)
            checkpoints.wait()

        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written.*step 1 is intact.*Free some space"
        ):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    equal(Checkpoints(tmp_path).restore(fresh(toy)).state, fresh(toy))
    # Once there is room, the same step can be saved.
    assert checkpoints.save(2, large, force=True)
    checkpoints.close()
    assert checkpoints.steps == [1, 2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_clock_that_is_set_during_a_save_does_not_end_the_run(
    tmp_path, monkeypatch, caplog, asynchronous
):
    """Orbax counts its timeouts in the time of day."""
    from orbax.checkpoint import v1 as ocp

    now = time.time

    class SetClock:
        def result(self):
            monkeypatch.setattr(time, "time", lambda: now() + 86_400)
            raise TimeoutError("timed out after 86400 seconds")

    def save(*arguments):
        monkeypatch.undo()
        return SetClock()

    monkeypatch.setattr(ocp, "save_checkpointables_async", save)
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    state = {"w": jnp.arange(4.0)}
    checkpoints.save(1, state, force=True)
    checkpoints.wait()
    assert "the clock was set while the checkpoint of step 1 was written" in caplog.text
    assert checkpoints.steps == ([] if asynchronous else [1])
    checkpoints.save(1, state, force=True)  # as fit does at the end
    checkpoints.wait()
    assert checkpoints.steps == [1]


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Checkpoints(tmp_path, every=0)
