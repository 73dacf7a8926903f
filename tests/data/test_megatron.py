import itertools
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import PackedTokens, TokenStore, packed_rows
from effscale.data.megatron import CorruptIndexedDataError, MegatronTokens, read_indexed
from effscale.data.statistics import token_counts
from effscale.data.writer import TokenStoreWriter

DEEPSPEED = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 6, "<u4": 7, "<u8": 8}
MEGATRON_UINT16 = 8


def write_indexed(prefix, items, dtype="<i4", code=None, documents=None):
    """The format from its description, number by number."""
    size = np.dtype(dtype).itemsize
    documents = range(len(items) + 1) if documents is None else documents
    index = b"MMIDIDX\0\0" + struct.pack("<QB", 1, DEEPSPEED[dtype] if code is None else code)
    index += struct.pack("<QQ", len(items), len(documents))
    for item in items:
        index += struct.pack("<i", len(item))
    place = 0
    for item in items:
        index += struct.pack("<q", place)
        place += len(item) * size
    for boundary in documents:
        index += struct.pack("<q", boundary)
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(
        b"".join(np.array(item, dtype).tobytes() for item in items)
    )
    return prefix


def items_of(data):
    return [data.values[a:b].tolist() for a, b in itertools.pairwise(data.bounds)]


@given(
    items=st.lists(st.lists(st.integers(0, 120), max_size=6), max_size=8),
    dtype=st.sampled_from(list(DEEPSPEED)),
)
def test_what_is_written_is_read(tmp_path_factory, items, dtype):
    prefix = write_indexed(tmp_path_factory.mktemp("i") / "data", items, dtype)
    data = read_indexed(prefix)
    assert items_of(data) == items
    assert data.documents.tolist() == list(range(len(items) + 1))
    if any(items):
        assert data.values.dtype == np.dtype(dtype)


def test_code_8_is_uint16_in_megatron_and_uint64_in_deepspeed(tmp_path):
    items = [[1, 2], [50_256]]
    short = read_indexed(write_indexed(tmp_path / "a", items, "<u2", code=MEGATRON_UINT16))
    long = read_indexed(write_indexed(tmp_path / "b", items, "<u8", code=8))
    assert (short.values.dtype, long.values.dtype) == (np.uint16, np.uint64)
    assert items_of(short) == items_of(long) == items


@given(at=st.integers(0, 33), bits=st.integers(1, 255))
def test_a_flipped_byte_of_the_header_is_an_error_or_changes_nothing(tmp_path_factory, at, bits):
    prefix = write_indexed(tmp_path_factory.mktemp("i") / "data", [[3, 4], [5], [6, 7, 8]], "<i4")
    whole = prefix.with_suffix(".idx").read_bytes()
    expected = read_indexed(prefix)
    altered = whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    prefix.with_suffix(".idx").write_bytes(altered)
    is_type = at == 17
    if is_type and altered[at] == DEEPSPEED["<u4"]:  # of the same size
        assert items_of(read_indexed(prefix)) == items_of(expected)
    else:
        with pytest.raises(CorruptIndexedDataError, match=r"magic|version|type of values|size"):
            read_indexed(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_every_truncation_is_an_error_that_names_the_file(tmp_path, suffix):
    prefix = write_indexed(tmp_path / "data", [[3, 4], [5], [6, 7, 8]], "<u2")
    whole = prefix.with_suffix(suffix).read_bytes()
    for size in range(len(whole)):
        prefix.with_suffix(suffix).write_bytes(whole[:size])
        with pytest.raises(CorruptIndexedDataError, match=rf"data{suffix}.*(size|header)"):
            read_indexed(prefix)
    prefix.with_suffix(suffix).write_bytes(whole + b"\0")
    with pytest.raises(CorruptIndexedDataError, match=rf"data{suffix}.*size"):
        read_indexed(prefix)


@given(at=st.integers(34, 200), value=st.integers(0, 255))
def test_altered_lengths_and_places_are_errors(tmp_path_factory, at, value):
    items = [[3, 4], [5], [6, 7, 8]]
    prefix = write_indexed(tmp_path_factory.mktemp("i") / "data", items, "<u2")
    whole = prefix.with_suffix(".idx").read_bytes()
    lengths_and_places = range(34, 34 + 12 * len(items))
    at = lengths_and_places[at % len(lengths_and_places)]
    prefix.with_suffix(".idx").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    if whole[at] == value:
        assert items_of(read_indexed(prefix)) == items
    else:
        with pytest.raises(CorruptIndexedDataError, match=r"lengths|position of item|size"):
            read_indexed(prefix)


def test_items_that_do_not_lie_in_order_are_an_error(tmp_path):
    prefix = write_indexed(tmp_path / "data", [[3, 4], [5, 6]], "<u2")
    index = bytearray(prefix.with_suffix(".idx").read_bytes())
    index[42:58] = struct.pack("<qq", 4, 0)
    prefix.with_suffix(".idx").write_bytes(index)
    with pytest.raises(
        CorruptIndexedDataError, match=r"position of item 0: expected byte 0.*found 4"
    ):
        read_indexed(prefix)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "0 as the first.*none"),
        ([1, 2], "0 as the first"),
        ([0, 3], "up to 2"),
        ([0, 2, 1], "increasing"),
    ],
)
def test_impossible_document_boundaries(tmp_path, documents, message):
    prefix = write_indexed(tmp_path / "data", [[1], [2]], documents=documents)
    with pytest.raises(CorruptIndexedDataError, match=message):
        read_indexed(prefix)


sentences = st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=4)


@given(corpus=st.lists(sentences, min_size=1, max_size=6), length=st.integers(1, 7))
def test_a_corpus_gives_the_rows_of_a_token_store(tmp_path_factory, corpus, length):
    folder = tmp_path_factory.mktemp("m")
    items = list(itertools.chain.from_iterable(corpus))
    boundaries = [0, *itertools.accumulate(len(document) for document in corpus)]
    write_indexed(folder / "corpus", items, "<u2", MEGATRON_UINT16, boundaries)
    ours = MegatronTokens.open(folder / "corpus", vocab_size=100, eos_token_id=7, verify="full")
    with TokenStoreWriter(folder / "store", vocab_size=100) as writer:
        for document in corpus:
            writer.add_document(list(itertools.chain.from_iterable(document)))
    store = TokenStore.open(folder / "store")
    assert ours.num_documents == store.num_documents
    assert ours.manifest["empty_documents"] == store.manifest["empty_documents"]
    assert ours.offsets.tolist() == store.offsets.tolist()
    assert token_counts(ours).tolist() == token_counts(store).tolist()
    rows, expected = PackedTokens(ours, length), PackedTokens(store, length)
    assert len(rows) == len(expected)
    for index in range(len(rows)):
        row, wanted = rows[index], expected[index]
        for name in wanted:
            np.testing.assert_array_equal(row[name], wanted[name])


def test_a_corpus_goes_through_the_pipeline_and_to_other_processes(tmp_path):
    write_indexed(
        tmp_path / "corpus", [list(range(40)), list(range(40, 60))], "<u2", MEGATRON_UINT16
    )
    corpus = MegatronTokens.open(
        tmp_path / "corpus", vocab_size=60, eos_token_id=3, tokenizer_digest="abc"
    )
    rows = packed_rows(corpus, length=8, num_epochs=1)
    seen = sorted(int(token) for i in range(len(rows)) for token in rows[i]["labels"])
    assert seen == list(range(1, 57))
    again = pickle.loads(pickle.dumps(corpus))
    assert (again.vocab_size, again.eos_token_id, again.manifest) == (60, 3, corpus.manifest)
    assert len(pickle.dumps(corpus)) < 500
    assert repr(corpus).startswith("MegatronTokens(")
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_the_digest_tells_corpora_apart(tmp_path):
    digests = set()
    for name, items in {"a": [[1, 2], [3]], "b": [[1], [2, 3]], "c": [[1, 2, 3]]}.items():
        write_indexed(tmp_path / name, items, "<u2")
        digests.add(MegatronTokens.open(tmp_path / name, vocab_size=9).manifest["digest"])
    assert len(digests) == 3


@pytest.mark.parametrize("length", [3, 200_000, 1_000_000])
def test_corpora_of_equal_document_lengths_have_different_digests(tmp_path, length):
    tokens = np.random.default_rng(0).integers(0, 9, length)
    # Other tokens throughout, and other ones at the very beginning or end only.
    corpora = {"a": tokens, "b": (tokens + 1) % 9, "c": tokens.copy(), "d": tokens.copy()}
    corpora["c"][0], corpora["d"][-1] = (tokens[0] + 1) % 9, (tokens[-1] + 1) % 9
    digests = set()
    for name, items in corpora.items():
        write_indexed(tmp_path / name, [items], "<u2")
        corpus = MegatronTokens.open(tmp_path / name, vocab_size=9)
        digests.add(corpus.manifest["digest"])
        again = MegatronTokens.open(tmp_path / name, vocab_size=9)
        assert again.manifest == corpus.manifest
    assert len(digests) == 4


def test_bad_arguments_and_corpora(tmp_path):
    prefix = write_indexed(tmp_path / "corpus", [[1, 2], [9]], "<i4")
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        MegatronTokens.open(prefix, vocab_size=0)
    with pytest.raises(ValueError, match=r"eos_token_id must be from 0 to .*got 9"):
        MegatronTokens.open(prefix, vocab_size=9, eos_token_id=9)
    MegatronTokens.open(prefix, vocab_size=9, verify="size")
    for verify in ("once", "full"):
        with pytest.raises(
            CorruptIndexedDataError, match="expected ids below vocab_size=9, found 9"
        ):
            MegatronTokens.open(prefix, vocab_size=9, verify=verify)
    MegatronTokens.open(prefix, vocab_size=10)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.idx.*without \.idx"):
        MegatronTokens.open(tmp_path / "nowhere", vocab_size=9)
    write_indexed(tmp_path / "analysis", [[1], [2]], documents=[0])
    with pytest.raises(
        CorruptIndexedDataError, match="last document boundary: expected 2 items, found 0"
    ):
        MegatronTokens.open(tmp_path / "analysis", vocab_size=9)
