"""Kept positions: uniform, independent, and the same or not as devices want it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effscale.ltd import sample_kept
from effscale.ltd.tokens import BRANCH
from effscale.parallel import MeshConfig


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 1), (9, 9), (12, 5), (16, 1), (129, 64)])
def test_rising_and_as_many_as_asked(length, kept):
    found = np.asarray(sample_kept(jax.random.key(3), (0, 4), 6, length, kept))
    assert found.shape == (2, 6, kept)
    assert found.dtype == np.int32
    assert (np.diff(found, axis=-1) > 0).all()
    assert found.min() >= 0
    assert found.max() < length


def test_uniform_over_subsets():
    """All 35 subsets of 3 of 7 positions, by a chi-squared test over 14,000 draws."""
    found = np.asarray(sample_kept(jax.random.key(0), tuple(range(20)), 700, 7, 3)).reshape(-1, 3)
    subsets = list(itertools.combinations(range(7), 3))
    counts = np.array([(found == subset).all(-1).sum() for subset in subsets])
    assert counts.sum() == len(found)
    expected = len(found) / len(subsets)
    # The statistic has mean 34 and standard deviation 8.2.
    assert ((counts - expected) ** 2 / expected).sum() < 34 + 4 * 8.2


def test_uniform_over_positions_of_a_long_row():
    length, kept, draws = 300, 100, 4000
    found = np.asarray(sample_kept(jax.random.key(1), tuple(range(8)), draws // 8, length, kept))
    counts = np.bincount(found.reshape(-1), minlength=length)
    share = kept / length
    deviations = (counts - draws * share) / np.sqrt(draws * share * (1 - share))
    assert np.abs(deviations).max() < 4.5
    assert 0.75 < deviations.var() < 1.25


def test_layers_rows_and_keys_are_independent():
    """Two draws of 40 of 80 have 20 in common, give or take sqrt(40 * 1/2 * 40/79) = 3.2."""
    one, two = (np.asarray(sample_kept(jax.random.key(k), (1, 2), 200, 80, 40)) for k in (5, 6))
    common = lambda a, b: np.mean([len(np.intersect1d(*pair)) for pair in zip(a, b, strict=True)])
    for a, b in ((one[0], one[1]), (one[0], two[0]), (one[0], np.roll(one[0], 1, 0))):
        assert abs(common(a, b) - 20) < 4 * 3.2 / np.sqrt(200)


def test_a_layers_draw_does_not_depend_on_its_neighbours():
    key = jax.random.key(2)
    np.testing.assert_array_equal(
        sample_kept(key, (1, 3, 6), 4, 20, 7)[1:], sample_kept(key, (3, 6), 4, 20, 7)
    )


def test_the_key_is_none_of_those_that_dropout_uses():
    key = jax.random.key(0)
    own = jax.random.key_data(jax.random.fold_in(key, BRANCH))
    for others in (jax.random.split(key, 64), [jax.random.fold_in(key, i) for i in range(64)]):
        assert all((jax.random.key_data(other) != own).any() for other in others)


draw = functools.partial(sample_kept, layers=(1, 2), batch=8, length=32, kept=12)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_as_on_one_device(sizes):
    mesh = MeshConfig(**sizes).build()
    with jax.set_mesh(mesh):
        found = jax.jit(lambda key: draw(key))(jax.random.key(9))
        batch = P(None, tuple(a for a in ("data", "fsdp") if mesh.shape[a] > 1), None)
        assert found.sharding.is_equivalent_to(jax.NamedSharding(mesh, batch), 3)
    np.testing.assert_array_equal(found, draw(jax.random.key(9)))


@pytest.mark.parametrize("manual", [{"data"}, {"data", "fsdp", "expert", "tensor"}], ids=len)
def test_shards_that_are_on_their_own(manual):
    """Data shards differ; tensor shards, which hold the same rows, agree."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    axes = tuple(a for a in mesh.axis_names if a in manual)

    def shard(key):
        positions = sample_kept(key, (1, 2), 8, 32, 12)
        mine = jnp.stack([jax.lax.axis_index(a) for a in axes])
        return positions[None], mine[None]

    # Whatever varies is given out shard by shard; where tensor shards are not on their own there is nothing to compare.
    out = P(axes)
    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=P(), out_specs=out, axis_names=manual, check_vma=False
    )
    with jax.set_mesh(mesh):
        positions, places = map(np.asarray, jax.jit(mapped)(jax.random.key(4)))
    groups: dict = {}
    for position, place in zip(positions, places, strict=True):
        groups.setdefault(tuple(place[:2] if len(place) > 1 else place), []).append(position)
    assert len(groups) == (4 if len(axes) > 1 else 2)
    for same in groups.values():
        for other in same:
            np.testing.assert_array_equal(other, same[0])
    firsts = [same[0] for same in groups.values()]
    for a, b in itertools.combinations(firsts, 2):
        assert (a != b).mean() > 0.5
