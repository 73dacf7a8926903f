import itertools
import json
import os
import shutil
import time

import fsspec
import jax
import pytest
from flax import nnx

from effscale.training import (
    AdamWConfig,
    Checkpoints,
    JsonlWriter,
    MirrorError,
    MultiWriter,
    RunFolder,
    RunMirror,
    create_train_state,
    fetch_run,
    fit,
    make_train_step,
    resume_or_start,
)
from effscale.training.manifest import MANIFEST
from effscale.training.mirror import _Place

NUMBERS = itertools.count()


@pytest.fixture
def url():
    return f"memory://bucket/{next(NUMBERS)}"


def names(url):
    return _Place(url).names()


def train(toy, step, folder, url, until, resume=False):
    optimizer = AdamWConfig().build(1e-2)
    create = lambda: create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0))
    data = toy.batches()
    with RunFolder.create(folder, config={"a": 1}, resume=resume) as run:
        checkpoints = Checkpoints(run.checkpoints, every=2, keep=2)
        state, start = resume_or_start(checkpoints, create, data)
        mirror = RunMirror(run.path, url)
        writer = MultiWriter([JsonlWriter(run.metrics_file, resume_step=start), mirror])
        fit(state, step, data, num_steps=until, checkpoints=checkpoints, writer=writer)
        writer.close()
    return start


def fail(*arguments):
    raise OSError("unreachable")


@pytest.fixture(scope="module")
def step(toy):
    return jax.jit(make_train_step(toy.loss_fn, AdamWConfig().build(1e-2)))


def goes_on_elsewhere(toy, step, tmp_path, url):
    train(toy, step, tmp_path / "whole", f"{url}/whole", 8)
    train(toy, step, tmp_path / "first", f"{url}/run", 5)
    steps = {name.split("/")[1] for name in names(f"{url}/run") if name.startswith("checkpoints/")}
    assert steps == {"step_00000004", "step_00000005"}  # that of step 2 is deleted, here and there
    # The machine is lost, with its disk.
    folder = fetch_run(f"{url}/run", tmp_path / "second")
    assert train(toy, step, folder, f"{url}/run", 8, resume=True) == 5
    whole, pieces = (tmp_path / name / "metrics.jsonl" for name in ("whole", "second"))
    assert whole.read_bytes() == pieces.read_bytes()
    back = fetch_run(f"{url}/run", tmp_path / "third")
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_a_run_goes_on_from_its_copy(toy, step, tmp_path, url):
    goes_on_elsewhere(toy, step, tmp_path, url)


@pytest.mark.slow  # the same as above on another store
def test_a_run_goes_on_from_its_copy_in_s3(toy, step, tmp_path, monkeypatch):
    server_of = pytest.importorskip("moto.server", reason="moto stands in for S3")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        s3fs.S3FileSystem().mkdir("bucket")
        goes_on_elsewhere(toy, step, tmp_path, "s3://bucket/runs")
        with pytest.raises(MirrorError, match=r"s3://nowhere/run: cannot be read .*bucket exists"):
            RunMirror(tmp_path / "first", "s3://nowhere/run")
    finally:
        server.stop()


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint that is finished and one that is not."""
    folder = tmp_path / "run"
    for name in ("config.json", "checkpoints/step_00000001/manifest.json", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("step_00000001/data", "step_00000002/data", "step_00000003.orbax-checkpoint-tmp"):
        (folder / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (folder / "checkpoints" / name).write_text("x")
    return folder


def test_only_what_is_finished_is_copied_and_manifests_come_last(run, url, monkeypatch):
    order = []
    put = _Place.put
    monkeypatch.setattr(
        _Place, "put", lambda self, path, name: (order.append(name), put(self, path, name))
    )
    mirror = RunMirror(run, url)
    mirror.flush()
    mirror.close()
    step = "checkpoints/step_00000001"
    assert order == ["mirror.json", "config.json", f"{step}/data", f"{step}/manifest.json"]
    assert names(url) == sorted(order)
    # A copy that was cut short does not count.
    fsspec.filesystem("memory").rm(f"{url}/{step}/manifest.json")
    assert sorted(p.name for p in fetch_run(url, run.parent / "back").iterdir()) == [
        "config.json",
        "mirror.json",
    ]


def test_a_copy_that_is_cut_short_lacks_nothing_that_its_marks_vouch_for(run, url, monkeypatch):
    """By name, done.json came before the model, and checkpoints before the metrics."""
    oldest_first = ["model.safetensors", "final.json", "done.json", "metrics.jsonl"]
    for seconds, name in enumerate(oldest_first):
        (run / name).write_text(name)
        os.utime(run / name, (seconds, seconds))
    os.utime(run / "checkpoints/step_00000001" / MANIFEST, (2.5, 2.5))
    order = []
    monkeypatch.setattr(_Place, "put", lambda self, path, name: order.append(path.name))
    monkeypatch.setattr(_Place, "owner", lambda self: mirror._name if order else None)
    mirror = RunMirror(run, url)
    mirror.close()
    assert order == [
        "mirror.json", "metrics.jsonl", *oldest_first[:3], "data", MANIFEST, "config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [b'{"run": "a"}', b"[]", b"{", b"\xff\xfe"])
def test_a_damaged_mirror_json_is_named(run, url, tmp_path, text):
    (run / "mirror.json").write_bytes(text)
    with pytest.raises(MirrorError, match=r"run/mirror\.json: is damaged"):
        RunMirror(run, url)
    fsspec.filesystem("memory").pipe(f"{url}/mirror.json", text)
    with pytest.raises(MirrorError, match=r"memory://.*/mirror\.json: is damaged"):
        fetch_run(url, tmp_path / "back")


def test_an_interrupted_fetch_leaves_nothing_and_can_be_repeated(run, url, tmp_path, monkeypatch):
    RunMirror(run, url).close()

    def interrupt(self, name, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Place, "get", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_run(url, tmp_path / "back")
    RunMirror(fetch_run(url, tmp_path / "back"), url).close()


def test_an_unknown_kind_of_store_is_named(run):
    with pytest.raises(ValueError, match=r"a mirror must be the URL of a store.*'nope://x'"):
        RunMirror(run, "nope://x")


@pytest.mark.parametrize("operation", ["put", "owner"])
def test_a_store_that_fails_for_a_while_stops_no_run(run, url, monkeypatch, caplog, operation):
    mirror = RunMirror(run, url)
    with monkeypatch.context() as patch:
        patch.setattr(_Place, operation, fail)
        mirror.flush()
        mirror.flush()
        assert "is not up to date: unreachable" in caplog.text
        with pytest.raises(MirrorError, match=r"the copy of .* is incomplete: .*unreachable"):
            mirror.close()
    mirror.close()
    assert "config.json" in names(url)


def test_a_store_that_cannot_be_read_at_the_start_says_what_to_do(run, url, monkeypatch):
    monkeypatch.setattr(_Place, "owner", fail)
    with pytest.raises(MirrorError, match=r"cannot be read .OSError: unreachable.*AWS_ACCESS_KEY"):
        RunMirror(run, url)


def test_of_two_processes_the_later_one_keeps_the_copy(run, url):
    first = RunMirror(run, url)
    second = RunMirror(run, url)
    with pytest.raises(MirrorError, match=r"taken over by process \d+ on .*End one of the two"):
        first.close()
    second.close()
    assert json.loads((run / "mirror.json").read_text())["process"] == second._name["process"]


def test_an_older_folder_does_not_replace_a_later_copy(run, url, tmp_path):
    RunMirror(run, url).close()
    later = fetch_run(url, tmp_path / "later")
    (later / "config.json").write_text("later")
    RunMirror(later, url).close()
    with pytest.raises(FileExistsError, match=r"contains a later copy of this run.*fetch_run"):
        RunMirror(run, url)
    assert (fetch_run(url, tmp_path / "back") / "config.json").read_text() == "later"
    RunMirror(later, url).close()


def test_a_process_killed_before_it_reaches_the_store_shuts_no_one_out(run, url, monkeypatch):
    RunMirror(run, url).close()
    with monkeypatch.context() as patch:
        patch.setattr(_Place, "put", lambda *arguments: None)
        RunMirror(run, url)
    RunMirror(run, url).close()
    assert _Place(url).owner() == json.loads((run / "mirror.json").read_text())


def test_files_that_are_being_written_are_left_out(run, url, monkeypatch):
    (run / ".results.json.tmp-host-1-2").write_text("half")
    (run / "gone.json").write_text("deleted while it is copied")
    put = _Place.put

    def late(self, path, name):
        if name == "gone.json":
            path.unlink()
        put(self, path, name)

    monkeypatch.setattr(_Place, "put", late)
    RunMirror(run, url).close()
    assert {"config.json", "mirror.json"} == {n for n in names(url) if "/" not in n}


def test_a_checkpoint_saved_again_is_copied_again(run, url):
    """Also if the mirror never sees the folder without it; what the old one had more is gone."""
    step = run / "checkpoints/step_00000001"
    (step / "only_before").write_text("x")
    mirror = RunMirror(run, url)
    mirror.flush()
    shutil.rmtree(step)
    step.mkdir()
    (step / "data").write_text("other")
    (step / MANIFEST).write_text('{"another": "manifest"}')
    mirror.close()
    back = fetch_run(url, run.parent / "back") / "checkpoints/step_00000001"
    assert {path.name for path in back.iterdir()} == {"data", MANIFEST}
    assert (back / "data").read_text() == "other"


def test_a_folder_can_be_the_store(run, tmp_path):
    place = f"file://{tmp_path}/copies/a"
    RunMirror(run, place).close()
    assert (fetch_run(place, tmp_path / "back") / "config.json").read_text() == "config.json"


def test_a_program_that_ends_early_still_makes_the_last_copy(run, url, monkeypatch, caplog):
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    RunMirror(run, url, every=1000.0)
    (run / "config.json").write_text("last words")
    at_exit[0]()
    assert (fetch_run(url, run.parent / "back") / "config.json").read_text() == "last words"


def test_an_error_in_a_run_is_more_important_than_its_copy(tmp_path, url, monkeypatch, caplog):
    run = RunFolder.create(tmp_path / "run", config={}, mirror=url)
    monkeypatch.setattr(_Place, "owner", fail)
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert "the copy of" in caplog.text


def test_places_that_are_taken_are_refused(run, url, tmp_path):
    RunMirror(run, url).close()
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FileExistsError, match="copy of a different run"):
        RunMirror(other, url)
    fsspec.filesystem("memory").pipe(f"{url}x/picture.png", b"")
    with pytest.raises(FileExistsError, match="something other than a copy of a run"):
        RunMirror(other, f"{url}x")
    with pytest.raises(FileNotFoundError, match="contains no copy of a run"):
        fetch_run(f"{url}y", tmp_path / "back")
    with pytest.raises(FileExistsError, match=r"[Cc]hoose another folder"):
        fetch_run(url, other)


def test_a_missing_package_is_named(run, monkeypatch):
    def missing(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(
        ImportError, match=r"s3://bucket/run needs s3fs: .*pip install 'effscale\[s3\]'"
    ):
        RunMirror(run, "s3://bucket/run")


def test_a_run_folder_keeps_its_copy_until_it_is_closed(tmp_path, url):
    with RunFolder.create(tmp_path / "run", config={"a": 1}, mirror=url) as run:
        run.write_results({"loss": 2.5})
    again = fetch_run(url, tmp_path / "again")
    with RunFolder.create(again, resume=True, mirror=url) as run:
        assert run.results() == {"loss": 2.5}
        run.write_results({"loss": 1.5})
    run.close()
    back = fetch_run(url, tmp_path / "back")
    assert json.loads((back / "results.json").read_text()) == {"loss": 1.5}


def test_a_mirror_copies_without_being_asked(run, url, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        mirror = RunMirror(run, url, every=0.01)
        deadline = time.monotonic() + 60
        while "config.json" not in names(url) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "config.json" in names(url)
        patch.setattr(_Place, "owner", fail)
        while "is not up to date" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "is not up to date: unreachable" in caplog.text
    (run / "config.json").write_text("longer than before")
    mirror.close()
    assert not mirror._timer.is_alive()
    assert (fetch_run(url, run.parent / "back") / "config.json").read_text() == "longer than before"


def test_a_run_whose_mirror_fails_at_the_start_leaves_nothing_in_the_way(
    tmp_path, url, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(_Place, "put", fail)
        with pytest.raises(MirrorError, match="cannot be written"):
            RunFolder.create(tmp_path / "run", config={}, mirror=url)
    RunFolder.create(tmp_path / "run", config={}, mirror=url).close()
