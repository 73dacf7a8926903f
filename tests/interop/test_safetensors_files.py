"""The reader of safetensors files, on sound files, on damaged ones and on what is none."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from effscale.interop.files.safetensors import CHECKSUMS, SafetensorsFile
from effscale.interop.files.writer import write_tensors
from effscale.interop.tensors import FolderError, Renamed, Tensors

ARRAYS = {
    "wte": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "h.0.w": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "h.1.w": np.array([[1.5, 7.0]], ml_dtypes.bfloat16),
    "half": np.array([np.nan, np.inf, 6e-8], np.float16),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4), np.float16),
    "mask": np.array([True, False, True]),
    "ids": np.arange(3),
}


FEW = {name: ARRAYS[name] for name in ("wte", "h.0.w", "mask")}


def assert_same(array, expected):
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


def read_all(path):
    file = SafetensorsFile(path)
    arrays = {name: file.read(name) for name in file.infos}
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (file.infos[name].shape, file.infos[name].dtype)
    return arrays


def read_or_error(path):
    try:
        return read_all(path)
    except FolderError as error:
        return error


def assert_unharmed(result, expected, path):
    """It is an error that names the file, or exactly the tensors that were written."""
    if isinstance(result, FolderError):
        assert str(path) in str(result)
        return
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        assert_same(result[name], array)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A file of ours, and a place for damaged copies of it."""
    folder = tmp_path_factory.mktemp("own")
    (path,) = write_tensors(folder, ARRAYS.items())
    return path.read_bytes(), folder / "damaged.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same with fewer tensors, where every single place is tried."""
    folder = tmp_path_factory.mktemp("small")
    (path,) = write_tensors(folder, FEW.items())
    return path.read_bytes(), folder / "damaged.safetensors"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A file of the safetensors library, without checksums, and a place for damaged copies."""
    data = save(ARRAYS, metadata={"format": "pt"})
    return data, tmp_path_factory.mktemp("others") / "damaged.safetensors"


def put(path, content):
    # Into a new file: some file systems flush one that is cut to nothing and written again.
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_of_the_library_are_read(tmp_path, metadata):
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata=metadata)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert isinstance(file, Tensors)
    assert file.infos.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert_same(file.read(name), expected)
        assert (file.infos[name].shape, file.infos[name].dtype) == (expected.shape, expected.dtype)
    with pytest.raises(FolderError, match=r"a\.safetensors': no tensor 'wpe'\."):
        file.read("wpe")
    with pytest.raises(ValueError, match="read-only"):
        file.read("wte")[0, 0] = 1


def test_types_that_are_not_taken_are_named_when_read(tmp_path):
    arrays = {"a": np.zeros(4, ml_dtypes.float8_e4m3fn), "b": np.ones(2, np.float32)}
    save_file(arrays, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.infos["a"].shape == (4,)
    assert_same(file.read("b"), arrays["b"])
    with pytest.raises(
        FolderError,
        match=r"a\.safetensors': the tensor 'a' has the type F8_E4M3, which is not supported\. Convert it to one of F64, F32, F16,",
    ):
        file.read("a")


def test_an_empty_model_has_no_tensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(raw({}))
    assert SafetensorsFile(tmp_path / "a.safetensors").infos == {}


def test_every_truncation_is_noticed(small):
    ours, path = small
    for data in (ours, save(FEW)):
        for length in range(len(data)):
            put(path, data[:length])
            with pytest.raises(
                FolderError, match=r"damaged\.safetensors': is not a valid safetensors file"
            ):
                read_all(path)
        put(path, data + b"\0")
        with pytest.raises(FolderError, match="is not a valid"):
            read_all(path)


def test_every_flipped_bit_in_our_files_is_noticed_or_changes_nothing(small):
    data, path = small
    unnoticed = set()
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            put(path, damaged)
            result = read_or_error(path)
            assert_unharmed(result, FEW, path)
            if not isinstance(result, FolderError):
                unnoticed.add(place)
    # What nobody reads: the key and value of "format": "pt", and a space that becomes another.
    nobody_reads = range(data.index(b"format"), data.index(CHECKSUMS.encode()))
    assert unnoticed <= set(nobody_reads) | {i for i in range(len(data)) if data[i] == 0x20}
    assert len(unnoticed) < 20


def test_a_flipped_bit_in_the_data_names_tensor_and_file(own):
    data, path = own
    place = data.rindex(ARRAYS["wte"].tobytes())
    put(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    file = SafetensorsFile(path)
    assert_same(file.read("h.0.w"), ARRAYS["h.0.w"])
    with pytest.raises(FolderError, match=r"damaged.safetensors.* data of tensor 'wte'"):
        file.read("wte")


def test_bytes_of_two_tensors_that_change_places_are_noticed(own):
    data, path = own
    header = data[: data.index(b"}}") + 2]
    put(path, header.replace(b'"h.0.w":{', b'"h.x.w":{').replace(b'"h.1.w":{', b'"h.0.w":{')
                     .replace(b'"h.x.w":{', b'"h.1.w":{') + data[len(header) :])  # fmt: skip
    with pytest.raises(FolderError, match="does not match its checksum"):
        read_all(path)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "copy"]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=4,
)


def edited(data, edits):
    data = bytearray(data)
    for kind, where, value in edits:
        place, length = where % max(len(data), 1), value % 40
        if kind == "flip" and data:
            data[place] ^= 1 << (value % 8)
        elif kind == "set" and data:
            data[place] = value % 256
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "insert":
            data[place:place] = bytes([value % 256]) * (length % 9)
        else:
            data[place : place + length] = data[value % (len(data) or 1) :][:length]
    return bytes(data)


@settings(max_examples=300)
@given(edits=EDITS)
def test_damage_of_any_kind_to_our_files_is_noticed_or_changes_nothing(own, edits):
    data, path = own
    put(path, edited(data, edits))
    assert_unharmed(read_or_error(path), ARRAYS, path)


@settings(max_examples=300)
@given(edits=EDITS)
def test_damage_to_files_of_others_is_an_error_or_a_valid_file(others, edits):
    data, path = others
    put(path, edited(data, edits))
    result = read_or_error(path)
    if isinstance(result, FolderError):
        assert str(path) in str(result)
    else:
        assert sum(array.nbytes for array in result.values()) < path.stat().st_size


@settings(max_examples=200)
@given(data=st.binary(max_size=64), text=st.text(max_size=64))
def test_arbitrary_bytes_are_an_error_or_an_empty_model(others, data, text):
    _, path = others
    for content in (data, raw(data), raw(text.encode()), raw({"a": one()}, data[:4])):
        put(path, content)
        result = read_or_error(path)
        if isinstance(result, FolderError):
            assert str(path) in str(result)
        else:
            assert result.keys() <= {"a"}


OVERLAP = {"a": one(shape=[2], offsets=[0, 8]), "b": one(shape=[2], offsets=[4, 12])}
TWICE = '{"a": %s, "a": %s}'

# Where the reason is the library's, only that it speaks of the header: words differ by version.
BAD = {
    "header-beyond-the-file": (raw({"a": one()}, b"1234", length=10**6), "header"),
    "header-of-2**63": (raw({"a": one()}, b"1234", length=2**63), "header"),
    "offsets-beyond-the-file": (raw({"a": one(shape=[2], offsets=[0, 8])}, b"1234"), "header"),
    "more-data-than-offsets": (raw({"a": one()}, b"12345678"), "header"),
    "overlap": (raw(OVERLAP, b"1" * 12), "header"),
    "hole": (raw({"a": one(offsets=[4, 8])}, b"1" * 8), "header"),
    "backwards": (raw({"a": one(offsets=[4, 0])}, b"1" * 4), "header"),
    "shape-of-another-size": (raw({"a": one(shape=[3])}, b"1234"), "header"),
    "shape-overflows": (raw({"a": one(shape=[2**62, 2**62])}, b"1234"), "header"),
    "negative": (raw({"a": one(shape=[-1])}, b"1234"), "header"),
    "name-twice": (
        raw((TWICE % (json.dumps(one()), json.dumps(one()))).encode(), b"1234"),
        "names 'a' twice",
    ),
    "name-twice-other-offsets": (
        raw((TWICE % (json.dumps(one(offsets=[4, 8])), json.dumps(one()))).encode(), b"1234"),
        "names 'a' twice",
    ),
    "unknown-type": (raw({"a": one("F99")}, b"1234"), "header"),
    "not-utf-8": (raw(b'{"\xff": 1}'), "header"),
    "not-an-object": (raw(b"[1, 2]"), "header"),
    "deep": (raw(b"[" * 100_000), "header"),
    "bool-of-seven": (raw({"a": one("BOOL", offsets=[0, 1])}, b"\x07"), "other than 0 and 1"),
    "checksums-are-no-json": (raw({"__metadata__": {CHECKSUMS: "{"}}), "checksums"),
    "checksums-of-others": (raw({"__metadata__": {CHECKSUMS: '{"b": 1}'}}), "have different names"),
    "checksums-are-a-list": (raw({"__metadata__": {CHECKSUMS: "[1]"}}), "have different names"),
    "empty": (b"", "the file is empty"),
    "short": (b"abc", "header"),
    "text": (b"once upon a time there was a file that held no weights\n", "header"),
    "web-page": (b"<!DOCTYPE html>\n<html>404</html>", "web page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n",
        "git-lfs pointer, not the weights",
    ),
    "zip": (b"PK\x03\x04" + b"\0" * 50, "zip archive"),
    "gguf": (b"GGUF" + b"\0" * 50, "GGUF"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_safetensors_file_is_said(tmp_path, case):
    content, reason = BAD[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FolderError, match=rf"bad.safetensors': is not a valid.*{reason}.*again"):
        read_all(tmp_path / "bad.safetensors")


def test_absent_files_and_folders_are_named(tmp_path):
    with pytest.raises(
        FolderError,
        match=r"no\.safetensors': is not a valid safetensors file: the file does not exist",
    ):
        SafetensorsFile(tmp_path / "no.safetensors")
    with pytest.raises(FolderError, match="cannot be opened"):
        SafetensorsFile(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(4.0)}, path)
    file = SafetensorsFile(path)
    save_file({"a": np.arange(4.0) + 1}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", path)
    with pytest.raises(FolderError, match="changed after it was opened"):
        file.read("a")
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(FolderError, match="changed after it was opened"):
        file.read("a")
    path.unlink()
    with pytest.raises(FolderError, match=re.escape("'a' cannot be read")):
        file.read("a")


def test_tensors_under_other_names(tmp_path):
    save_file({"a.gamma": np.ones(2), "a.beta": np.zeros(2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    renamed = Renamed(file, lambda name: name.replace("gamma", "weight"))
    assert isinstance(renamed, Tensors)
    assert renamed.infos == {"a.weight": file.infos["a.gamma"], "a.beta": file.infos["a.beta"]}
    assert_same(renamed.read("a.weight"), np.ones(2))
    with pytest.raises(FolderError, match=r"no tensor 'a.gamma'"):
        renamed.read("a.gamma")
    with pytest.raises(FolderError, match=r"'a.\w+' and 'a.\w+' would both become 'b'"):
        Renamed(file, lambda name: "b")
