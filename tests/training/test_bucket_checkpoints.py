"""Checkpoints in Google Cloud Storage, of which an emulation runs on this machine."""

import itertools
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.training import (
    AdamWConfig,
    CheckpointError,
    Checkpoints,
    create_train_state,
    fit,
    make_train_step,
    restore_model,
    resume_or_start,
    storage,
)

OPTIMIZER = AdamWConfig().build(1e-2)


NUMBERS = itertools.count()


def fresh(toy, seed=0):
    return create_train_state(toy.Toy(rngs=nnx.Rngs(seed)), OPTIMIZER, key=jax.random.key(seed))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        # Asked when gcsfs is imported: whether to find out the kind of each bucket, which the emulation cannot tell.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs", reason="gcsfs is not installed")
        emulator = pytest.importorskip(
            "gcp_storage_emulator.server", reason="gcp-storage-emulator stands in for the cloud"
        )
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        yield server
        server.stop()


@pytest.fixture
def bucket(server, request):
    """An empty folder of a bucket."""
    return f"gs://bucket/{request.node.originalname}/{next(NUMBERS)}"


def objects(url):
    store = storage._store(storage.folder_path(url))
    return sorted(name.removeprefix(url[5:] + "/") for name in store.find(url))


def test_a_run_is_saved_there_and_goes_on(toy, bucket):
    step = jax.jit(make_train_step(toy.loss_fn, OPTIMIZER))
    whole = fit(fresh(toy), step, toy.batches(), num_steps=7)
    losses = []
    for until in (4, 7):
        data = toy.batches()
        with Checkpoints(f"{bucket}/checkpoints", config={"a": 1}, every=2, keep=2) as checkpoints:
            state, start = resume_or_start(checkpoints, lambda: fresh(toy), data)
            ended = fit(state, step, data, num_steps=until, checkpoints=checkpoints)
        losses += [record["loss"] for record in ended.history]
    assert start == 4
    assert losses == [record["loss"] for record in whole.history]
    assert checkpoints.steps == [6, 7]  # the older ones are deleted, with all their objects
    assert {name.split("/")[1] for name in objects(bucket)} == {"step_00000006", "step_00000007"}
    model, number = restore_model(bucket, jax.eval_shape(lambda: fresh(toy).model))
    assert number == 7
    equal(model, whole.state.model)


def save_steps(toy, url, *steps):
    with Checkpoints(url, every=1) as checkpoints:
        for step in steps:
            checkpoints.save(step, fresh(toy, seed=step))


def test_what_is_damaged_is_passed_over_and_put_aside(toy, bucket):
    save_steps(toy, bucket, 1, 2, 3)
    store = storage._store(storage.folder_path(bucket))
    arrays = [name for name in store.find(bucket) if "/model/d/" in name]
    lost = next(name for name in arrays if "step_00000003" in name)
    replaced = next(name for name in arrays if "step_00000002" in name)
    store.rm(lost)
    content = store.cat_file(replaced)
    store.pipe_file(replaced, bytes([content[0] ^ 1]) + content[1:])
    checkpoints = Checkpoints(bucket, every=1)
    restored = checkpoints.restore(fresh(toy))
    assert restored.step == 1
    assert "is missing" in restored.skipped[0][1]
    assert "has changed" in restored.skipped[1][1]
    equal(restored.state, fresh(toy, seed=1))
    checkpoints.save(2, fresh(toy, seed=9))
    checkpoints.close()
    equal(Checkpoints(bucket).restore(fresh(toy)).state, fresh(toy, seed=9))
    aside = {name.split("/")[1] for name in objects(bucket) if name.startswith("set_aside/")}
    assert aside == {"step_00000002.0", "step_00000003.0"}


def test_one_that_was_not_finished_does_not_count(toy, bucket, monkeypatch):
    """As of a run that is killed before the manifest is written, and while a checkpoint is deleted."""
    save_steps(toy, bucket, 1, 2)
    folder = storage.folder_path(bucket)
    for step in (1, 2):
        (folder / f"step_{step:08d}.writing").write_text("")
    (folder / "step_00000002" / "manifest.json").unlink()
    checkpoints = Checkpoints(bucket, every=1)
    assert checkpoints.restore(fresh(toy)).step == 1
    checkpoints.save(2, fresh(toy, seed=9))
    checkpoints.close()
    assert checkpoints.steps == [1, 2]
    assert not any(name.endswith(".writing") for name in objects(bucket))


def test_a_step_of_another_run_is_never_overwritten(toy, bucket):
    save_steps(toy, bucket, 1, 2)
    with pytest.raises(CheckpointError, match="already contains the checkpoint of step 2"):
        Checkpoints(bucket).save(2, fresh(toy), force=True)


def test_a_bucket_that_cannot_be_read_says_what_to_do(server):
    with pytest.raises(OSError, match=r"gs://nowhere/run: cannot be read .*gcloud auth .*Admin"):
        Checkpoints("gs://nowhere/run")


def test_a_name_that_is_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"must not contain \*.*got 'gs://bucket/run\*'"):
        Checkpoints("gs://bucket/run*")


def test_without_gcsfs_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ImportError, match=r"'gs://bucket/run' needs gcsfs: .*pip install 'effscale\[gcs\]'"
    ):
        Checkpoints("gs://bucket/run")
