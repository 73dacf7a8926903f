import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import TokenStore
from effscale.data.store import CorruptTokenStoreError, manifest_digest
from effscale.data.writer import TokenStoreWriter

documents = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=12)


@given(documents=documents, eos_token_id=st.sampled_from([None, 7]), chunk=st.integers(1, 9))
def test_what_is_written_is_read(make_store, documents, eos_token_id, chunk):
    store = make_store(documents, vocab_size=100, eos_token_id=eos_token_id)
    expected = [d + ([] if eos_token_id is None else [eos_token_id]) for d in documents if d]
    assert [store.document(i).tolist() for i in range(store.num_documents)] == expected
    tokens = list(itertools.chain.from_iterable(expected))
    assert store.tokens.tolist() == tokens
    assert [token for part in store.chunks(chunk) for token in part] == tokens
    assert store.manifest["empty_documents"] == sum(not d for d in documents)
    assert TokenStore.open(store.folder, verify="full").num_tokens == len(store.tokens)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_width_follows_the_vocabulary(make_store, vocab_size, dtype):
    store = make_store([[0, vocab_size - 1]], vocab_size=vocab_size)
    assert store.tokens.dtype == dtype
    assert store.document(0).tolist() == [0, vocab_size - 1]


def test_a_store_is_read_only_and_pickles_by_name(make_store):
    store = make_store([[1, 2], [3]])
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 5
    data = pickle.dumps(store)
    assert len(data) < 500
    assert pickle.loads(data).tokens.tolist() == [1, 2, 3]
    with pytest.raises(IndexError, match="index must be from 0 to 1, got 2"):
        store.document(2)


def test_ids_outside_the_vocabulary_are_refused_and_leave_nothing(tmp_path):
    for bad in ([5, 10], [-1]):
        with (
            pytest.raises(ValueError, match="must be from 0 to vocab_size-1=9"),
            TokenStoreWriter(tmp_path / "store", vocab_size=10) as writer,
        ):
            writer.add_document(bad)
        assert list(tmp_path.iterdir()) == []


def test_impossible_arguments_are_refused(tmp_path, make_store):
    with pytest.raises(ValueError, match=r"vocab_size must be .*got 0"):
        TokenStoreWriter(tmp_path / "store", vocab_size=0)
    with pytest.raises(ValueError, match=r"eos_token_id must be from 0 to .*got 10"):
        TokenStoreWriter(tmp_path / "store", vocab_size=10, eos_token_id=10)
    with pytest.raises(FileNotFoundError, match="no token store found"):
        TokenStore.open(tmp_path / "nowhere")


def test_a_store_is_written_once_unless_told(tmp_path):
    for value, overwrite in ((1, False), (2, True)):
        with TokenStoreWriter(tmp_path / "s", vocab_size=10, overwrite=overwrite) as writer:
            writer.add_document([value])
        assert TokenStore.open(tmp_path / "s").tokens.tolist() == [value]
    with (
        pytest.raises(FileExistsError, match="overwrite=True"),
        TokenStoreWriter(tmp_path / "s", vocab_size=10),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_every_damage_is_found_and_named(make_store, name, damage):
    store = make_store([[1, 2, 3], [4, 5]] * 10)
    if damage is truncate and name == "manifest.json":
        damage = lambda folder, name: (folder / name).write_text('{"format": ')
    damage(store.folder, name)
    with pytest.raises(CorruptTokenStoreError, match=f"{name}.*build the store again") as caught:
        TokenStore.open(store.folder)
    assert caught.value.file == store.folder / name
    assert caught.value.expected in str(caught.value)
    assert caught.value.found in str(caught.value)
    if damage is not flip or name == "manifest.json":
        with pytest.raises(CorruptTokenStoreError, match=name):
            TokenStore.open(store.folder, verify="size")


def test_a_truncation_is_told_in_bytes(make_store):
    store = make_store([[1, 2, 3]])
    truncate(store.folder, "tokens.bin")
    with pytest.raises(CorruptTokenStoreError, match="expected 6 bytes, found 5 bytes"):
        TokenStore.open(store.folder)


def rewrite(store, **changes):
    manifest = {**store.manifest, **changes}
    manifest["digest"] = manifest_digest(manifest)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))


def test_counts_that_contradict_the_offsets_are_found(make_store):
    store = make_store([[1, 2, 3]])
    rewrite(store, num_tokens=4)
    with pytest.raises(CorruptTokenStoreError, match="offsets from 0 to 4, found 0 to 3"):
        TokenStore.open(store.folder)


def test_other_formats_and_versions_are_told_apart(make_store):
    store = make_store([[1]])
    rewrite(store, version=99)
    with pytest.raises(ValueError, match="format version 99"):
        TokenStore.open(store.folder)
    rewrite(store, format="something")
    with pytest.raises(CorruptTokenStoreError, match="format 'effscale-token-store'"):
        TokenStore.open(store.folder)


def test_ids_outside_the_vocabulary_are_found_when_read(make_store):
    store = make_store([[1, 2, 3]])
    rewrite(store, vocab_size=3)
    with pytest.raises(CorruptTokenStoreError, match=r"tokens\.bin.*ids below 3, found 3"):
        TokenStore.open(store.folder)
    TokenStore.open(store.folder, verify="size")
