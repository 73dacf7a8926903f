"""Files of torch.save: every layout that PyTorch writes, and pickles that want to run code."""

import collections
import io
import os
import pickle
import re
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from effscale.interop.files.torch import RESIDENT_PART, TorchFile
from effscale.interop.tensors import FolderError, Tensors

torch = pytest.importorskip("torch", reason="these tests write files with PyTorch")


def state_dict():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "f32": base.clone(),
        "f64": torch.tensor([1.5, -2.0], dtype=torch.float64),
        "f16": torch.tensor([1.5, float("nan"), 6e-8], dtype=torch.float16),
        "bf16": torch.tensor([[1.5, -2.0, float("inf")]], dtype=torch.bfloat16),
        "bf16_scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "bf16_strided": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)[1:, ::2].T,
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "transposed": base.T,
        "strided": base[1:3, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tied": base,
    }


def as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        # Another way than the reader's: bfloat16 is the upper half of a float32.
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_holds(file, expected):
    assert file.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        array, wanted = file.read(name), as_numpy(tensor)
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert (file.infos[name].dtype, file.infos[name].shape) == (array.dtype, array.shape)
        assert array.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before-1.6"])
def test_every_layout_and_type(tmp_path, new_format):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=new_format)
    file = TorchFile(path)
    assert isinstance(file, Tensors)
    assert_holds(file, state_dict())
    with pytest.raises(ValueError, match="read-only"):
        file.read("f32")[0, 0] = 1
    with pytest.raises(FolderError, match=r"pytorch_model\.bin': no tensor 'nope'\."):
        file.read("nope")


def test_what_was_read_survives_that_the_file_is_mapped_anew(tmp_path):
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(3 * RESIDENT_PART)}
    torch.save(tensors, tmp_path / "a.bin")
    file = TorchFile(tmp_path / "a.bin")
    kept, maps = {}, set()
    for name in tensors:
        kept[name] = file.read(name)
        maps.add(id(file._mapped))
    assert len(maps) > 1
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(kept[name], tensor.numpy())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": state, "epoch": 3, "lr": 0.1},
        lambda state: {"state_dict": collections.OrderedDict(state), "optimizer": {"step": 1}},
        lambda state: {"model": {"module": state}},
    ],
    ids=["deepspeed", "lightning", "twice"],
)
def test_a_model_inside_a_checkpoint_is_found(tmp_path, wrap):
    state = {"a": torch.ones(2)}
    torch.save(wrap(state), tmp_path / "a.pt")
    assert_holds(TorchFile(tmp_path / "a.pt"), state)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.ones(1), "step": 3}, r"more than tensors: 'step' \(int\)"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, r"more than tensors: 'b' \(dict\)"),
        ({3: torch.ones(1)}, r"more than tensors: 3 \(Tensor\)"),
        ({str(i): i for i in range(11)}, r"'9' \(int\) \.\.\."),
        (torch.ones(1), "contains a Tensor, not a state dict"),
        ([torch.ones(1)], "contains a list, not a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(FolderError, match=rf"a.bin': is not a valid PyTorch file.*{reason}"):
        TorchFile(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("complex64", torch.ones(1, dtype=torch.complex64)),
        ("float8_e4m3fn", torch.ones(1).to(torch.float8_e4m3fn)),
        ("sparse_coo", torch.eye(2).to_sparse()),
    ],
)
def test_types_that_are_not_taken_are_named_when_read(tmp_path, name, tensor):
    torch.save({"odd": tensor, "a": torch.ones(2)}, tmp_path / "a.bin")
    file = TorchFile(tmp_path / "a.bin")
    np.testing.assert_array_equal(file.read("a"), np.ones(2, np.float32))
    with pytest.raises(FolderError, match=rf"tensor 'odd' has the type .*{name}.*not supported"):
        file.read("odd")


class Payload:
    """Unpickled without protection, this writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({self.target!r}, 'w').close()",))


class Shell(Payload):
    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("payload", [Payload, Shell])
@pytest.mark.parametrize("form", ["zip", "before-1.6", "pickle-2", "pickle-5"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, payload, form):
    target, path = tmp_path / "written", tmp_path / "pytorch_model.bin"
    content = {"a": torch.ones(2), "b": payload(str(target))}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"b": content["b"]}, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FolderError) as caught:
        TorchFile(path)
    assert not target.exists()
    message = str(caught.value)
    assert str(path) in message
    assert "weights_only" not in message
    if form in ("zip", "before-1.6"):
        assert re.search(
            rf"refers to '\w*\.?{'exec' if payload is Payload else 'system'}'", message
        )
        assert "nothing in the file was run" in message
    # The payload is what it claims to be.
    if form == "pickle-2":
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"once upon a time\n" * 9, "damaged or contains more|Error"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\n", "git-lfs pointer"),
        (b"PK\x03\x04" + b"\0" * 100, "central directory"),
        (b"<html><body>not found</body></html>", "a web page"),
    ],
)
def test_what_is_no_torch_file_is_said(tmp_path, content, reason):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(FolderError, match=rf"a.bin': is not a valid PyTorch file.*{reason}"):
        TorchFile(tmp_path / "a.bin")


def test_absent_and_truncated_files(tmp_path):
    with pytest.raises(
        FolderError,
        match=r"a\.bin': is not a valid PyTorch file of weights: the file does not exist",
    ):
        TorchFile(tmp_path / "a.bin")
    for new_format in (True, False):
        buffer = io.BytesIO()
        torch.save(state_dict(), buffer, _use_new_zipfile_serialization=new_format)
        data = buffer.getvalue()
        for length in range(1, len(data), 97):
            (tmp_path / "a.bin").write_bytes(data[:length])
            with pytest.raises(FolderError, match=r"a.bin'"):
                TorchFile(tmp_path / "a.bin")


def test_an_archive_without_tensors_in_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    with pytest.raises(FolderError, match=r"a.bin': is not a valid PyTorch file"):
        TorchFile(tmp_path / "a.bin")


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    tensors = {"a": torch.ones(1000), "b": torch.zeros(1000)}
    torch.save(tensors, tmp_path / "a.bin")
    file = TorchFile(tmp_path / "a.bin")
    file.read("a")
    torch.save({"a": torch.ones(10)}, tmp_path / "new.bin")
    os.replace(tmp_path / "new.bin", tmp_path / "a.bin")
    with pytest.raises(FolderError, match="changed after it was opened"):
        file.read("b")


def test_without_torch_the_error_says_what_to_install(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install torch, or convert"):
        TorchFile(tmp_path / "a.bin")
