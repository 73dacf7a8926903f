"""Checks that run once per machine and state of a file."""

import os
import pickle

import pytest

from effscale.data import TokenStore, verified
from effscale.data.store import CorruptTokenStoreError


@pytest.fixture
def readings(monkeypatch, tmp_path):
    """The files whose contents stores read to verify them; small files leave marks here."""
    monkeypatch.setattr(verified, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, check = [], TokenStore._check_content
    monkeypatch.setattr(
        TokenStore, "_check_content", lambda store, name: read.append(name) or check(store, name)
    )
    return read


def flip_unseen(path):
    """Flips a bit and puts the time back, as a copy or a restored backup has it."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_store_is_read_once_until_it_changes(make_store, readings):
    store = make_store([[1, 2, 3]])
    assert sorted(readings) == ["offsets.bin", "tokens.bin"]
    readings.clear()
    again = pickle.loads(pickle.dumps(TokenStore.open(store.folder)))
    assert again.tokens.tolist() == [1, 2, 3]
    assert not readings
    TokenStore.open(store.folder, verify="full")
    assert len(readings) == 2
    flip_unseen(store.folder / "tokens.bin")
    for _ in range(2):  # what failed is not remembered
        with pytest.raises(CorruptTokenStoreError, match=r"tokens\.bin.*blake2b"):
            TokenStore.open(store.folder)
    flip_unseen(store.folder / "tokens.bin")
    assert TokenStore.open(store.folder).tokens.tolist() == [1, 2, 3]


def test_a_store_opened_by_size_is_not_read_in_other_processes_either(make_store, readings):
    folder = make_store([[1, 2, 3]]).folder
    flip_unseen(folder / "tokens.bin")
    readings.clear()
    pickle.loads(pickle.dumps(TokenStore.open(folder, verify="size")))
    assert not readings


@pytest.mark.parametrize("cache", ["file", "homeless", "small"])
def test_what_cannot_be_remembered_is_read_each_time(
    make_store, readings, cache, tmp_path, monkeypatch
):
    if cache == "file":
        (tmp_path / "cache").write_text("in the way")
    elif cache == "small":
        monkeypatch.setattr(verified, "MIN_BYTES", 1000)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr("pathlib.Path.home", _no_home)
    folder = make_store([[1, 2, 3]]).folder
    TokenStore.open(folder)
    assert len(readings) == 4
    assert not (tmp_path / "cache" / "effscale").exists()


def _no_home():
    raise RuntimeError("Could not determine home directory.")
