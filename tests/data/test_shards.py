"""A corpus in shards, and hundreds of hosts that read it together."""

import itertools
import pickle
import shutil

import grain
import numpy as np
import pytest

from effscale.data import TokenShards, batch_rows, make_dataset, packed_rows
from effscale.data.store import CorruptTokenStoreError
from effscale.data.writer import TokenStoreWriter

LENGTH = 4


def write(folder, documents, **options):
    with TokenStoreWriter(folder, vocab_size=1000, **options) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five shards of unequal sizes; no two rows are alike. One is too short for a row."""
    folder = tmp_path_factory.mktemp("corpus")
    token = itertools.count()
    for index, size in enumerate((120, 3, 250, 77, 401)):
        write(folder / f"shard_{index:05d}", [[next(token) for _ in range(size)]])
    return folder


def firsts(batches):
    return [int(first) for batch in batches for first in batch["input_ids"][:, 0]]


def test_an_epoch_of_shards_holds_every_row_once(corpus):
    shards = TokenShards.open(corpus / "shard_*")
    assert shards.num_tokens == 851
    expected = []
    for shard in shards.shards:  # by the definition of a row, shard by shard
        tokens = shard.tokens.tolist()
        expected += [tokens[start] for start in range(0, len(tokens) - 1, LENGTH)]
    options = {"batch_size": 3, "length": LENGTH, "num_epochs": 1, "remainder": "pad"}
    in_order = firsts(make_dataset(shards, shuffle=False, **options))
    assert in_order == expected  # 213 rows, the last of three shards padded
    shuffled = firsts(make_dataset(shards, seed=1, **options))
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)
    # The first hundred rows come from everywhere, not from the first shard.
    rows = packed_rows(shards, length=LENGTH, num_epochs=1)
    bounds = np.cumsum([shard.num_tokens for shard in shards.shards])
    origin = np.searchsorted(bounds, [rows[i]["input_ids"][0] for i in range(100)], side="right")
    assert set(origin) == {0, 2, 3, 4}


def test_shards_may_be_a_component_of_a_mixture(corpus, make_store):
    shards = TokenShards.open(corpus / "shard_*")
    other = make_store([[999] * 300])
    dataset = make_dataset([shards, other], weights=[0.75, 0.25], batch_size=8, length=LENGTH)
    mixed = firsts(itertools.islice(dataset, 20))
    assert mixed.count(999) == 40
    again = pickle.loads(pickle.dumps(shards))
    assert again.manifest == shards.manifest
    assert TokenShards(shards.shards[::-1]).manifest["digest"] != shards.manifest["digest"]


def test_each_process_verifies_its_part(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    path = folder / "shard_00002" / "tokens.bin"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    found = []
    for index in range(3):
        try:
            TokenShards.open(folder / "shard_*", process_index=index, process_count=3)
        except CorruptTokenStoreError as error:
            found.append((index, error.file))
    assert found == [(2, path)]


def test_bad_shards_are_refused(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder matches .*nothing_\*"):
        TokenShards.open(corpus / "nothing_*")
    with pytest.raises(
        ValueError, match="process_index must be from 0 to process_count-1=3, got 4"
    ):
        TokenShards.open(corpus / "shard_*", process_index=4, process_count=4)
    with pytest.raises(ValueError, match="at least one"):
        TokenShards([])
    for name in "ab":
        write(tmp_path / name, [[1] * 9], tokenizer_digest=name)
    with pytest.raises(ValueError, match="a different tokenizer"):
        TokenShards.open(tmp_path / "*")


def test_more_rows_than_can_be_shuffled_are_refused(corpus, monkeypatch):
    monkeypatch.setattr("effscale.data.pipeline.MAX_ROWS", 100)
    with pytest.raises(ValueError, match=r"has 210 rows .* at most 100 can be shuffled"):
        packed_rows(TokenShards.open(corpus / "shard_*"), length=LENGTH)


def test_five_hundred_readers_become_fewer_in_the_middle_of_an_epoch():
    """No reader knows of another, and what they read is the epoch of a single one, in its order."""
    batch, change, num_rows = 1536, 3, 7 * 1536 + 100  # 1536 rows divide over 512 and over 384
    rows = grain.MapDataset.range(num_rows).shuffle(seed=3)
    whole = [rows[i] for i in range(num_rows)]

    def readers(count):
        options = {"batch_size": batch, "process_count": count, "num_threads": 0}
        return [iter(batch_rows(rows, process_index=index, **options)) for index in range(count)]

    read, before = [], readers(512)
    for _ in range(change):
        read += [int(row) for reader in before for row in next(reader)]
    assert read == whole[: change * batch]
    position, *others = [reader.get_state() for reader in before]
    assert all(other == position for other in others)

    after = readers(384)
    for reader in after:
        reader.set_state(position)
    for parts in zip(*after, strict=True):
        read += [int(row) for part in parts for row in part]
    assert read == whole[: 7 * batch]  # the last 100 rows do not fill a batch
    assert len(set(read)) == len(read)
