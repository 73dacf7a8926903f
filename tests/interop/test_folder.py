"""Which files of a folder are taken for its weights, and what is said where none can be."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from effscale.interop.folder import open_tensors, read_json
from effscale.interop.tensors import FolderError, Tensors

INDEX = "model.safetensors.index.json"


def write(folder, name, **tensors):
    save_file({key: np.full(2, value, np.float32) for key, value in tensors.items()}, folder / name)


def write_index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def values(tensors):
    assert isinstance(tensors, Tensors)
    return {name: float(tensors.read(name)[0]) for name in tensors.infos}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="this test writes files with PyTorch")


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path, "model-00001-of-00002.safetensors", a=1, b=2)
    write(tmp_path, "model-00002-of-00002.safetensors", c=3)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(tmp_path, {"a": first, "b": first, "c": second})
    return tmp_path


def test_the_order_of_names(tmp_path, torch):
    torch.save({"d": torch.full((2,), 4.0)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    write_index(tmp_path, {"d": "pytorch_model-00001-of-00001.bin"}, "pytorch_model.bin.index.json")
    assert values(open_tensors(tmp_path)) == {"d": 4}
    torch.save({"c": torch.full((2,), 3.0)}, tmp_path / "pytorch_model.bin")
    assert values(open_tensors(str(tmp_path))) == {"c": 3}
    write(tmp_path, "part.safetensors", b=2)
    write_index(tmp_path, {"b": "part.safetensors"})
    assert values(open_tensors(tmp_path)) == {"b": 2}
    write(tmp_path, "model.safetensors", a=1)
    assert values(open_tensors(tmp_path)) == {"a": 1}


def test_shards_are_read_as_one(sharded):
    tensors = open_tensors(sharded)
    assert values(tensors) == {"a": 1, "b": 2, "c": 3}
    assert tensors.infos["c"].shape == (2,)
    with pytest.raises(
        FolderError, match=r"model\.safetensors\.index\.json': no tensor 'd' in its files\."
    ):
        tensors.read("d")


def test_shards_of_pytorch(tmp_path, torch):
    for i, name in enumerate("ab"):
        torch.save({name: torch.full((2,), float(i))}, tmp_path / f"{name}.bin")
    write_index(tmp_path, {"a": "a.bin", "b": "b.bin"}, "pytorch_model.bin.index.json")
    assert values(open_tensors(tmp_path)) == {"a": 0, "b": 1}


def test_a_single_file_of_another_name(tmp_path, torch):
    write(tmp_path, "adapter_model.safetensors", x=0)
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"b": torch.full((2,), 2.0)}, tmp_path / "weights.bin")
    assert values(open_tensors(tmp_path)) == {"b": 2}
    write(tmp_path, "net.safetensors", a=1)
    assert values(open_tensors(tmp_path)) == {"a": 1}
    write(tmp_path, "ema.safetensors", a=1)
    with pytest.raises(FolderError, match=r"ema.safetensors, net.safetensors.*'model.safetensors'"):
        open_tensors(tmp_path)


def test_several_files_of_pytorch(tmp_path):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        FolderError,
        match=r"has several files that could be the weights: a\.bin, b\.bin\. Rename the right one to 'pytorch_model\.bin'",
    ):
        open_tensors(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(FolderError, match=r"has no weights: no model\.safetensors.*empty\.$"):
        open_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(FolderError, match=r"has no weights.* It contains: config.json, onnx/\.$"):
        open_tensors(tmp_path)
    for i in range(25):
        (tmp_path / f"log{i}").touch()
    with pytest.raises(FolderError, match=r" and 7 more\.$"):
        open_tensors(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(
        FolderError,
        match=r"there is no folder 'gpt2'\. Models are not downloaded automatically.*hf download",
    ):
        open_tensors("gpt2")
    with pytest.raises(FolderError, match="no folder"):
        read_json(tmp_path / "nope", "config.json")
    write(tmp_path, "model.safetensors", a=1)
    with pytest.raises(FolderError, match=r"is a file; pass the folder"):
        open_tensors(tmp_path / "model.safetensors")


def test_missing_shards_are_all_named(sharded):
    for i in (1, 2):
        (sharded / f"model-0000{i}-of-00002.safetensors").unlink()
    message = r"model\.safetensors\.index\.json': 2 of its 2 files are missing: model-00001-of-00002\.safetensors, model-00002-of-00002"
    with pytest.raises(FolderError, match=message):
        open_tensors(sharded)


@pytest.mark.parametrize("number", [1, 2])
def test_shards_without_an_index_are_not_read(sharded, number):
    (sharded / INDEX).unlink()
    (sharded / f"model-0000{number}-of-00002.safetensors").unlink()
    write(sharded, "another.safetensors", a=7)
    with pytest.raises(FolderError, match=r"shards but no index.*was not completed"):
        open_tensors(sharded)


def test_a_tensor_that_is_not_where_the_index_says(sharded):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(sharded, {"a": first, "b": second, "c": second})
    with pytest.raises(
        FolderError,
        match=r"model\.safetensors\.index\.json': does not match its files: 1 tensors are not where it lists them, the first is 'b' in 'model-00002",
    ):
        open_tensors(sharded)


def test_a_tensor_that_the_index_does_not_name_is_listed(sharded):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(sharded, {"a": first, "c": second})
    assert values(open_tensors(sharded)) == {"a": 1, "c": 3, "b": 2}
    # In two files: the index decides, or nobody.
    write(sharded, second, b=9, c=3)
    write_index(sharded, {"a": first, "b": first, "c": second})
    assert values(open_tensors(sharded))["b"] == 2
    write_index(sharded, {"a": first, "c": second})
    with pytest.raises(
        FolderError,
        match=r"model\.safetensors\.index\.json': does not name 'b', which both 'model-00001-of-00002\.safetensors' and 'model-00002-of-00002\.safetensors' contain",
    ):
        open_tensors(sharded)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/../../b.safetensors", "/etc/passwd", "C:\\x", "..\\x", "", "\0"],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, name):
    write(tmp_path, "secret.safetensors", a=1)
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, {"a": name})
    with pytest.raises(FolderError, match="outside its folder, which is not allowed"):
        open_tensors(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(
        FolderError,
        match=r"model\.safetensors\.index\.json': has no weight_map from names of tensors to names of files\.",
    ):
        open_tensors(tmp_path)


def test_links_as_in_the_hubs_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write(tmp_path / "blobs", "4d7a", a=1)
    (folder / "shard.safetensors").symlink_to("../blobs/4d7a")
    write_index(folder, {"a": "shard.safetensors"})
    assert values(open_tensors(folder)) == {"a": 1}
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(
        FolderError,
        match=r"model\.safetensors': is not a valid safetensors file: the file does not exist",
    ):
        open_tensors(folder)


def test_without_torch_its_files_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ImportError, match="pip install torch"):
        open_tensors(tmp_path)
    write(tmp_path, "model.safetensors", a=1)
    assert values(open_tensors(tmp_path)) == {"a": 1}


def test_json(tmp_path):
    with pytest.raises(FolderError, match=r"has no config\.json\. It is empty"):
        read_json(tmp_path, "config.json")
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "ü": [1]}', encoding="utf-8")
    assert read_json(tmp_path, "config.json") == {"model_type": "gpt2", "ü": [1]}
    path.write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(
        FolderError, match=r"config\.json': is not JSON: line 3, column 7: Expecting ':' delimiter"
    ):
        read_json(tmp_path, "config.json")
    path.write_text("[1]")
    with pytest.raises(FolderError, match=r"must be a JSON object .*, got a list"):
        read_json(tmp_path, "config.json")
    for content in (b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(FolderError, match=r"config.json': (cannot be read|is not JSON)"):
            read_json(tmp_path, "config.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(FolderError, match="cannot be read"):
        read_json(tmp_path, "config.json")
