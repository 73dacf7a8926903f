"""Files that the safetensors library and transformers read, and saves that replace another whole."""

import errno
import json
import os
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from effscale.data import DiskFullError
from effscale.interop.files import writer
from effscale.interop.files.writer import parse_size, write_tensors
from effscale.interop.folder import open_tensors
from effscale.interop.tensors import FolderError

INDEX = "model.safetensors.index.json"
ARRAYS = {
    "wte": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "w": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "half": np.array([np.nan, np.inf, 6e-8], np.float16),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4), np.float16),
    "mask": np.array([True, False, True]),
    "ids": np.arange(3),
    "transposed": np.arange(12.0).reshape(3, 4).T,
    "strided": np.arange(12, dtype=np.int16)[::5],
}


def assert_holds(folder, expected):
    tensors = open_tensors(folder)
    assert tensors.infos.keys() == expected.keys()
    for name, array in expected.items():
        got = tensors.read(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def shards(count):
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def test_one_file(tmp_path):
    folder = tmp_path / "new" / "model"
    assert write_tensors(folder, ARRAYS.items()) == [folder / "model.safetensors"]
    assert names(folder) == ["model.safetensors"]
    assert_holds(folder, ARRAYS)
    for name, array in load_file(folder / "model.safetensors").items():
        assert array.tobytes() == ARRAYS[name].tobytes()
    # Each tensor lies at a multiple of its element's size.
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__")["format"] == "pt"
    for name, entry in header.items():
        assert entry["data_offsets"][0] % ARRAYS[name].itemsize == 0


def test_bytes_depend_on_the_tensors_only(tmp_path):
    (first,) = write_tensors(tmp_path / "a", ARRAYS.items())
    (second,) = write_tensors(tmp_path / "b", reversed(ARRAYS.items()))
    assert first.read_bytes() == second.read_bytes()


def test_big_endian_arrays_are_turned(tmp_path):
    write_tensors(tmp_path, [("a", np.arange(4, dtype=">f4"))])
    assert_holds(tmp_path, {"a": np.arange(4, dtype=np.float32)})


def test_shards_and_their_index(tmp_path):
    sizes = {"a": 5, "b": 5, "c": 30, "d": 1, "e": 9, "f": 1}
    arrays = {name: np.full(size, size, np.int8) for name, size in sizes.items()}
    files = [*shards(4), INDEX]
    assert write_tensors(tmp_path, arrays.items(), max_shard_size=10) == [
        tmp_path / name for name in files
    ]
    assert names(tmp_path) == files
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 51}
    first, second, third, fourth = shards(4)
    assert index["weight_map"] == {
        "a": first, "b": first, "c": second, "d": third, "e": third, "f": fourth
    }  # fmt: skip
    assert_holds(tmp_path, arrays)


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), limit=st.integers(1, 20))
def test_any_sizes_in_any_shards(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("any")
    arrays = {f"t{i}": np.full(size, i, np.int8) for i, size in enumerate(sizes)}
    files = write_tensors(folder, arrays.items(), max_shard_size=limit)
    assert_holds(folder, arrays)
    for file in files:
        if file.name != INDEX:
            held = [array.nbytes for array in load_file(file).values()]
            assert sum(held) <= limit or sum(size > 0 for size in held) == 1


def test_at_most_one_shard_is_in_memory(tmp_path):
    alive, most = {}, 0

    def tensors():
        nonlocal most
        for i in range(20):
            array = np.zeros(100, np.int8)
            alive[i] = weakref.ref(array)
            most = max(most, sum(100 for reference in alive.values() if reference() is not None))
            yield f"t{i}", array
            del array

    write_tensors(tmp_path, tensors(), max_shard_size=400)
    assert most == 500  # four, and the next one


def test_a_folder_is_converted_in_place(tmp_path):
    write_tensors(tmp_path, ARRAYS.items(), max_shard_size=30)
    tensors = open_tensors(tmp_path)
    write_tensors(tmp_path, ((name, tensors.read(name)) for name in tensors.infos))
    assert names(tmp_path) == ["model.safetensors"]
    assert_holds(tmp_path, ARRAYS)


def test_an_earlier_save_is_replaced_and_nothing_else(tmp_path):
    for name in ("config.json", "adapter_model.safetensors", "model-of-mine.safetensors"):
        (tmp_path / name).write_text("mine")
    rest = names(tmp_path)
    arrays = {"a": np.zeros(4, np.int8), "b": np.ones(4, np.int8)}
    for limit, files in (
        (8, ["model.safetensors"]),
        (4, [*shards(2), INDEX]),
        (3, [*shards(2), INDEX]),
        (8, ["model.safetensors"]),
    ):
        write_tensors(tmp_path, arrays.items(), max_shard_size=limit)
        assert names(tmp_path) == sorted(rest + files)
        assert_holds(tmp_path, arrays)
    more = arrays | {"c": np.ones(4, np.int8)}
    write_tensors(tmp_path, more.items(), max_shard_size=4)
    write_tensors(tmp_path, arrays.items(), max_shard_size=4)
    assert names(tmp_path) == sorted([*rest, *shards(2), INDEX])
    assert_holds(tmp_path, arrays)
    assert (tmp_path / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
)
def test_weights_in_pytorchs_format_are_not_joined(tmp_path, name):
    (tmp_path / name).write_text("weights")
    with pytest.raises(FolderError, match=rf"contains weights in PyTorch's format \({name}\)"):
        write_tensors(tmp_path, ARRAYS.items())
    assert names(tmp_path) == [name]


def test_what_cannot_be_written(tmp_path):
    array = np.zeros(2)
    cases = [
        ([("a", array), ("a", array)], r"the tensor 'a' occurs twice\."),
        ([("__metadata__", array)], "the reserved name"),
        ([("a", array), ("b", np.zeros(2, complex))], "'b' has the type complex128, .* F64, F32"),
        ([("a", np.zeros(2, ml_dtypes.float8_e4m3fn))], "'a' has the type float8_e4m3fn"),
        ([("a", np.array(["x"]))], "'a' has the type <U1"),
        ([], "no tensors to write"),
    ]
    for tensors, message in cases:
        with pytest.raises(FolderError, match=message):
            write_tensors(tmp_path, tensors)
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="is a file; pass a folder"):
        write_tensors(tmp_path / "file", ARRAYS.items())


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (7, 7), ("7", 7), ("7B", 7), ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1GiB", 2**30),
        ("1 kib", 1024), ("0.5KB", 500), ("2TB", 2 * 10**12), (" 3mib ", 3 * 2**20),
        ("9007199254740993", 9007199254740993), ("1.1GB", 1_100_000_000),
    ],
)  # fmt: skip
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size", [0, -1, "0", "0.1B", "-5GB", "GB", "", "five", "5XB", "5G", "1e9", "nan", True]
)
def test_what_is_no_size(tmp_path, size):
    with pytest.raises(ValueError, match=r"max_shard_size must be .* '5GB', '500MB' or '1GiB'"):
        write_tensors(tmp_path, ARRAYS.items(), max_shard_size=size)
    assert names(tmp_path) == []


OLD = {f"t{i}": np.full(4, i, np.int8) for i in range(6)}
NEW = {name: array + np.int8(100) for name, array in OLD.items()}
# Bytes of a shard: one file, three shards, two shards.
LIMITS = [24, 8, 12]


def test_an_exception_leaves_the_earlier_save(tmp_path):
    write_tensors(tmp_path, OLD.items(), max_shard_size=8)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fails():
        yield from list(NEW.items())[:5]
        raise RuntimeError("the model is gone")

    for limit in LIMITS:
        with pytest.raises(RuntimeError, match="the model is gone"):
            write_tensors(tmp_path, fails(), max_shard_size=limit)
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_earlier_save(tmp_path, monkeypatch):
    write_tensors(tmp_path, OLD.items())
    real, calls = writer._write_file, []

    def full(path, *what):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        real(path, *what)

    monkeypatch.setattr(writer, "_write_file", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        write_tensors(tmp_path, NEW.items(), max_shard_size=8)
    assert names(tmp_path) == ["model.safetensors"]
    assert_holds(tmp_path, OLD)


# For each pair of an earlier save and a new one: forks once for every system call that the new save
# makes, and kills the child before that call.
KILLED = """
import os, pathlib, shutil, signal, sys
import numpy as np
from effscale.interop.files.writer import write_tensors

root, *limits = sys.argv[1:]
OLD = {f"t{i}": np.full(4, i, np.int8) for i in range(6)}
NEW = {name: array + np.int8(100) for name, array in OLD.items()}

def count_down(function):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **kwargs)
    return call

def kill_everywhere(old, new):
    global left
    place = pathlib.Path(root, f"{old}-{new}")
    write_tensors(place / "earlier", OLD.items(), max_shard_size=old)
    for point in range(1000):
        shutil.copytree(place / "earlier", place / str(point))
        child = os.fork()
        if not child:
            left = point
            for name in ("rename", "replace", "unlink", "fsync", "mkdir", "rmdir", "open"):
                setattr(os, name, count_down(getattr(os, name)))
            write_tensors(place / str(point), NEW.items(), max_shard_size=new)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL

for old in limits:
    for new in limits:
        kill_everywhere(old, new)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    limits = [str(limit) for limit in LIMITS]
    subprocess.run([sys.executable, "-c", KILLED, str(root), *limits], check=True)
    return root


def which(folder):
    """The save that a folder holds, or the error where it holds none."""
    try:
        tensors = open_tensors(folder)
    except FolderError as error:
        return str(error)
    held = {name: tensors.read(name).tobytes() for name in tensors.infos}
    saves = {"old": OLD, "new": NEW}
    (save,) = [
        key
        for key, arrays in saves.items()
        if held == {name: array.tobytes() for name, array in arrays.items()}
    ]
    return save


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("new", LIMITS)
@pytest.mark.parametrize("old", LIMITS)
def test_a_kill_at_any_point_leaves_one_of_both_saves_or_an_error(killed, old, new):
    folders = sorted(
        (entry for entry in (killed / f"{old}-{new}").iterdir() if entry.name != "earlier"),
        key=lambda entry: int(entry.name),
    )
    found = [which(folder) for folder in folders]
    errors = [error for error in found if error not in ("old", "new")]
    assert found == ["old"] * found.count("old") + errors + ["new"] * found.count("new")
    assert found.count("old") > 5
    assert found.count("new") > 1
    # Only shards under the same names leave no way to switch at once.
    assert bool(errors) == (old == new != 24)
    assert all("was not completed" in error for error in errors)
    # The next save puts everything right.
    for folder in folders[:: 5 if not errors else 1]:
        write_tensors(folder, NEW.items(), max_shard_size=new)
        assert_holds(folder, NEW)
        assert names(folder) == names(folders[-1])


@pytest.mark.parametrize("limit", ["5GB", "20KB"], ids=["one-file", "shards"])
def test_transformers_loads_it_without_a_warning(tmp_path, limit, caplog, monkeypatch):
    torch = pytest.importorskip("torch", reason="the oracle of this test is PyTorch")
    hf = pytest.importorskip("transformers", reason="the oracle of this test is transformers")
    monkeypatch.setattr(hf.utils.logging._get_library_root_logger(), "propagate", True)
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = hf.GPT2LMHeadModel(config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied
    config.save_pretrained(tmp_path)
    files = write_tensors(tmp_path, state.items(), max_shard_size=limit)
    assert len(files) == 1 if limit == "5GB" else len(files) > 3
    caplog.clear()
    loaded, report = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, local_files_only=True
    )
    assert not any(report.values())
    assert [record.getMessage() for record in caplog.records if record.levelno >= 30] == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_names_are_those_of_transformers(tmp_path):
    pytest.importorskip("torch", reason="the oracle of this test is PyTorch")
    hf = pytest.importorskip("transformers", reason="the oracle of this test is transformers")
    hf.utils.logging.disable_progress_bar()
    config = hf.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    theirs = open_tensors(tmp_path / "theirs")
    assert len(theirs.infos) == 28
    tensors = ((name, theirs.read(name)) for name in theirs.infos)
    write_tensors(tmp_path / "ours", tensors, max_shard_size="20KB")
    assert_holds(tmp_path / "ours", {name: theirs.read(name) for name in theirs.infos})
    files = [name for name in names(tmp_path / "theirs") if name.startswith("model")]
    assert files == [*shards(len(files) - 1), INDEX]
    ours, other = (json.loads((tmp_path / who / INDEX).read_text()) for who in ("ours", "theirs"))
    assert ours["metadata"]["total_size"] == other["metadata"]["total_size"]
    assert ours["weight_map"].keys() == other["weight_map"].keys()
