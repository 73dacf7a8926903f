"""Models of images, for images of another size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import Rotary, abstract_model, resize_images, vit
from effscale.models.image_size import bicubic_weights

SIZE = {"num_layers": 1, "d_model": 8, "num_heads": 2, "num_classes": 3}


def slow_weight(old, at, j):
    """The border repeated far outwards: what the sample at ``at`` takes from all copies of sample ``j``."""
    total = 0.0
    for k in range(-4, old + 4):
        x = abs(at - k)
        if min(max(k, 0), old - 1) == j and x < 2:
            cubic = [1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3]
            total += cubic[x > 1]
    return total


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 5), (3, 2), (4, 8), (7, 7), (14, 24), (9, 4)])
def test_bicubic_weights(old, new):
    expected = [
        [slow_weight(old, (i + 0.5) * old / new - 0.5, j) for j in range(old)] for i in range(new)
    ]
    found = bicubic_weights(old, new)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"), [(1, 4), (3, 7), (8, 3), (14, 24), (16, 16), (37, 16), (4, 7), (5, 5)]
)
def test_bicubic_weights_are_those_of_torch(old, new):
    torch = pytest.importorskip("torch", reason="the oracle of this test is PyTorch")
    grid = np.random.default_rng(0).normal(size=(old, old, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(grid.transpose(2, 0, 1)[None]),
        size=(new, new),
        mode="bicubic",
        align_corners=False,
    )[0].numpy()
    weights = bicubic_weights(old, new)
    found = np.einsum("yh,xw,hwd->dyx", weights, weights, grid)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("image_size", [4, 12, 20])
def test_the_model_takes_the_new_size(image_size, tiny):
    model = tiny(vit(**SIZE, image_size=8, patch_size=4))
    kept = np.asarray(model.embed.positions.embedding.get_value())
    resized = resize_images(model, image_size)
    assert resized.config == vit(**SIZE, image_size=image_size, patch_size=4)
    assert jax.tree.structure(resized) == jax.tree.structure(abstract_model(resized.config))
    table = np.asarray(resized.embed.positions.embedding.get_value())
    np.testing.assert_array_equal(table[0], kept[0])
    images = jnp.ones((2, image_size, image_size, 3))
    assert jax.eval_shape(lambda m: m(images), resized)["classes"].shape == (2, 3)
    # The old one is untouched, and everything else is shared.
    np.testing.assert_array_equal(model.embed.positions.embedding.get_value(), kept)
    assert model.config == vit(**SIZE, image_size=8, patch_size=4)
    assert model.groups[0].blocks[0].attention.positions == model.config.positions
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(resized), strict=True)
    assert sum(a is not b for a, b in pairs) == 1


def test_rows_and_columns_are_not_exchanged(tiny):
    """Embeddings that only vary from row to row still do."""
    model = tiny(vit(**SIZE, image_size=12, patch_size=4))
    rows = jnp.broadcast_to(jnp.array([0.0, 1.0, 2.0])[:, None, None], (3, 3, 8)).reshape(9, 8)
    model.embed.positions.embedding[...] = jnp.concatenate([jnp.full((1, 8), 7.0), rows])
    table = resize_images(model, 20).embed.positions.embedding.get_value()
    grid = np.asarray(table[1:]).reshape(5, 5, 8)
    np.testing.assert_allclose(grid, grid[:, :1, :1] * np.ones((1, 5, 8)), atol=1e-6)
    assert (np.diff(grid[:, 0, 0]) > 0).all()


def test_the_same_size_changes_nothing(tiny):
    model = tiny(vit(**SIZE, image_size=12, patch_size=4))
    same = resize_images(model, 12)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_stays(tiny):
    model = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16), tiny(vit(**SIZE, image_size=8, patch_size=4))
    )
    table = resize_images(model, 16).embed.positions.embedding.get_value()
    assert table.dtype == jnp.bfloat16


def test_positions_without_a_table(tiny):
    config = dataclasses.replace(vit(**SIZE, image_size=8, patch_size=4), positions=Rotary())
    resized = resize_images(tiny(config), 16)
    assert resized.config.positions == Rotary()
    out = jax.eval_shape(lambda m: m(jnp.ones((1, 16, 16, 3))), resized)
    assert out["hidden"].shape == (1, 17, 8)


def test_errors(tiny):
    model = tiny("vit")
    with pytest.raises(
        ValueError,
        match=r"image_size must be a multiple of patch_size=4, such as 8 or 12.*, got 10",
    ):
        resize_images(model, 10)
    with pytest.raises(ValueError, match=r"image_size must be a multiple .*, such as 4.*, got 0"):
        resize_images(model, 0)
    with pytest.raises(ValueError, match=r"image_size must be a multiple.*, got -4"):
        resize_images(model, -4)
    with pytest.raises(
        ValueError, match=r"model must be an image model, got one with the inputs TokenInputs"
    ):
        resize_images(tiny("gpt2"), 8)
