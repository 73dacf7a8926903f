import collections
import itertools

import grain
import numpy as np
import pytest

from effscale.data import PackedTokens, batch_rows, make_dataset, packed_rows

LENGTH = 4


@pytest.fixture(scope="module")
def stores(make_store):
    """Three stores whose tokens tell them apart: ids from 0, 300 and 600."""
    rng = np.random.default_rng(0)
    return [
        make_store([(base + rng.integers(0, 250, 11)).tolist() for _ in range(size)])
        for base, size in ((0, 60), (300, 30), (600, 20))
    ]


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def rows_of(batches):
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def test_shapes_and_an_epoch_holds_each_row_once(stores):
    batches = list(make_dataset(stores[0], batch_size=4, length=LENGTH, num_epochs=1))
    packed = PackedTokens(stores[0], LENGTH)
    assert len(batches) == len(packed) // 4
    assert all(array.shape == (4, LENGTH) for array in batches[0].values())
    seen = collections.Counter(rows_of(batches))
    everything = collections.Counter(
        tuple(packed[i]["input_ids"].tolist()) for i in range(len(packed))
    )
    assert not seen - everything
    assert (everything - seen).total() == len(packed) % 4


def test_order_follows_the_seed_and_each_epoch_has_its_own(stores):
    options = {"batch_size": 4, "length": LENGTH}
    first = take(make_dataset(stores[0], seed=3, **options), 90)
    same(first, take(make_dataset(stores[0], seed=3, **options), 90))
    assert rows_of(first) != rows_of(take(make_dataset(stores[0], seed=4, **options), 90))
    rows, per_epoch = rows_of(first), len(PackedTokens(stores[0], LENGTH))
    assert rows[:per_epoch] != rows[per_epoch : 2 * per_epoch]
    assert sorted(rows[:per_epoch]) == sorted(rows[per_epoch : 2 * per_epoch])
    plain = take(make_dataset(stores[0], shuffle=False, **options), 2)
    assert plain[0]["input_ids"].ravel().tolist() == stores[0].tokens[:16].tolist()


def test_the_order_is_the_same_on_every_machine(make_store):
    """Fixed values: another order would make old runs impossible to resume."""
    store = make_store([list(range(100, 165))])
    batches = take(make_dataset(store, batch_size=2, length=4, seed=7), 10)
    assert [row[0] for row in rows_of(batches)] == [
        112,
        132,
        144,
        104,
        100,
        116,
        136,
        120,
        160,
        140,
        152,
        108,
        156,
        124,
        148,
        128,
        108,
        100,
        160,
        156,
    ]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_resume_goes_on_exactly(stores, threads, mixed):
    data = stores if mixed else stores[0]
    options = {"batch_size": 4, "length": LENGTH, "seed": 1, "num_threads": threads}
    whole = take(make_dataset(data, **options), 60)
    for stop in (0, 1, 17, 39, 55):
        iterator = iter(make_dataset(data, **options))
        for _ in range(stop):
            next(iterator)
        state = iterator.get_state()
        resumed = iter(make_dataset(data, **options))
        resumed.set_state(state)
        same(list(itertools.islice(resumed, 5)), whole[stop : stop + 5])


def test_grain_agrees_that_it_is_checkpointable(stores):
    dataset = make_dataset(stores, batch_size=48, length=LENGTH, num_epochs=1, num_threads=0)
    grain.experimental.assert_equal_output_after_checkpoint(dataset)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(stores, count, mixed):
    data = stores if mixed else stores[0]
    options = {"batch_size": 8, "length": LENGTH, "seed": 5}
    single = take(make_dataset(data, **options), 30)
    parts = [
        take(make_dataset(data, process_index=index, process_count=count, **options), 30)
        for index in range(count)
    ]
    assert parts[0][0]["input_ids"].shape == (8 // count, LENGTH)
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(joined, single)


def test_a_run_may_resume_on_another_number_of_processes(stores):
    options = {"batch_size": 8, "length": LENGTH, "seed": 5}
    iterator = iter(make_dataset(stores[0], **options))
    for _ in range(9):
        next(iterator)
    expected = next(iterator)
    part = iter(make_dataset(stores[0], process_index=1, process_count=2, **options))
    part.set_state({"next_index": 9})
    same([next(part)], [{key: value[4:] for key, value in expected.items()}])


def test_mixture_follows_the_weights(stores):
    weights = [0.5, 0.3, 0.2]
    batches = take(make_dataset(stores, batch_size=8, length=LENGTH, weights=weights), 250)
    origin = np.concatenate([batch["input_ids"][:, 0] // 300 for batch in batches])
    shares = np.bincount(origin, minlength=3) / len(origin)
    np.testing.assert_allclose(shares, weights, atol=0.005)
    # Every stretch has its share, not only the whole.
    np.testing.assert_allclose(np.bincount(origin[:100], minlength=3) / 100, weights, atol=0.03)


def test_without_weights_a_mixture_is_proportional_to_size(stores):
    sizes = np.array([len(PackedTokens(store, LENGTH)) for store in stores])
    batches = take(make_dataset(stores, batch_size=4, length=LENGTH, num_epochs=1), 10_000)
    origin = np.concatenate([batch["input_ids"][:, 0] // 300 for batch in batches])
    assert len(set(rows_of(batches))) == len(rows_of(batches))
    assert sizes.sum() - 8 <= len(origin) <= sizes.sum()
    np.testing.assert_allclose(np.bincount(origin) / len(origin), sizes / sizes.sum(), atol=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_counts_every_label_once(stores, count):
    options = {"batch_size": 6, "length": 7, "shuffle": False, "num_epochs": 1, "remainder": "pad"}
    parts = [
        list(make_dataset(stores[1], process_index=index, process_count=count, **options))
        for index in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    total = sum(float(batch["loss_weights"].sum()) for part in parts for batch in part)
    assert total == stores[1].num_tokens - stores[1].num_documents
    assert all(batch["input_ids"].shape == (6 // count, 7) for part in parts for batch in part)


def test_rows_are_an_ordinary_grain_dataset(stores):
    rows = packed_rows(stores[0], length=LENGTH, num_epochs=1)
    short = rows.map(lambda row: {key: value[:2] for key, value in row.items()})
    batch = next(iter(batch_rows(short, batch_size=3)))
    assert batch["labels"].shape == (3, 2)


def test_too_small_a_corpus_names_the_numbers(make_store):
    store = make_store([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with pytest.raises(
        ValueError, match=r"9 tokens are 2 rows of length=4, fewer than batch_size=3"
    ):
        make_dataset(store, batch_size=3, length=4)
    with pytest.raises(ValueError, match=r"9 tokens are fewer than one row of length=64"):
        make_dataset([store, make_store([[1] * 600])], batch_size=1, length=64)
    with pytest.raises(ValueError, match=r"2 rows, fewer than batch_size=3"):
        batch_rows(packed_rows(store, length=4, num_epochs=1), batch_size=3)
    # Padded, one batch is possible.
    assert (
        len(list(make_dataset(store, batch_size=3, length=4, num_epochs=1, remainder="pad"))) == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "Use a multiple, such as 8"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"process_index": 1}, "process_index must be from 0 to process_count-1=0, got 1"),
        ({"weights": [1.0]}, "one entry for each of the 3 stores, got 1"),
        ({"weights": [1.0, 0.0, 1.0]}, "above 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1.*got 0"),
        ({"seed": -1}, "seed must be.*got -1"),
        ({"remainder": "pad"}, "endless data"),
    ],
)
def test_bad_arguments_are_refused(stores, options, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(stores, **{"batch_size": 4, "length": LENGTH, **options})


def test_stores_must_exist_and_share_a_tokenizer(make_store):
    with pytest.raises(ValueError, match="at least one token store"):
        packed_rows([], length=4)
    left, right = (make_store([[1] * 40], tokenizer_digest=name) for name in "ab")
    with pytest.raises(ValueError, match="encoded with the same tokenizer"):
        make_dataset([left, right], batch_size=1, length=4)
