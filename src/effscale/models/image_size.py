"""Use a trained image model at another image size, by interpolating its position embeddings."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from effscale.models.attention import Attention
from effscale.models.config import PatchInputs
from effscale.models.positions import LearnedPositions
from effscale.models.transformer import Transformer
from effscale.models.weights import dense

SHARPNESS = -0.75
"""Slope of the cubic kernel at distance 1, as in PyTorch and OpenCV; Keys uses -0.5."""


def resize_images(model: Transformer, image_size: int) -> Transformer:
    """Return the model for square images of another size, with patches of the same size.

    The position embeddings for the new grid of patches are interpolated from the trained ones, as
    ``torch.nn.functional.interpolate`` does with ``mode="bicubic"``. The class token keeps its embedding. No other
    parameter depends on the image size.

    Args:
        model: An image model; it is not changed.
        image_size: Height and width of the new images in pixels, a multiple of the patch size.

    Returns:
        The new model with an updated config. It shares all arrays except the position embeddings with ``model``.

    Raises:
        ValueError: The inputs of the model are not images, or the size is not a multiple of the patch size.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), section 3.2. https://arxiv.org/abs/2010.11929

    Example:
        >>> from effscale.models import vit
        >>> config = vit(num_layers=1, d_model=8, num_heads=2, image_size=32, patch_size=8)
        >>> larger = resize_images(Transformer(config, rngs=nnx.Rngs(0)), 48)
        >>> larger.embed.positions.embedding.shape
        (37, 8)
    """
    config = model.config
    inputs, positions = config.inputs, config.positions
    if not isinstance(inputs, PatchInputs):
        raise ValueError(f"model must be an image model, got one with the inputs {inputs}")
    patch = inputs.patch_size
    if image_size < 1 or image_size % patch:
        below = image_size // patch * patch
        near = [str(size) for size in (below, below + patch) if size > 0]
        raise ValueError(
            f"image_size must be a multiple of patch_size={patch}, such as {' or '.join(near)}, got {image_size}"
        )
    resized = nnx.merge(*nnx.split(model))
    embed: Any = resized.embed
    new_inputs = dataclasses.replace(inputs, image_size=image_size)
    embed.inputs = new_inputs
    if isinstance(positions, LearnedPositions):
        positions = dataclasses.replace(positions, num=new_inputs.num_tokens)
        for _, module in nnx.iter_modules(resized):
            if isinstance(module, Attention):
                module.positions = positions
        old = embed.positions.embedding
        table = resize_grid(dense(old.get_value()), inputs.image_size // patch, image_size // patch)
        embed.positions.embedding = old.replace(table)
    resized.config = dataclasses.replace(config, inputs=new_inputs, positions=positions)
    return resized


def resize_grid(
    table: Float[Array, "tokens width"], old: int, new: int
) -> Float[Array, "new_tokens width"]:
    """Return the class token's row, followed by an ``old`` by ``old`` grid interpolated to ``new`` by ``new``."""
    grid = rearrange(table[1:].astype(jnp.float32), "(h w) d -> h w d", h=old)
    weights = jnp.asarray(bicubic_weights(old, new))
    # Full precision: accelerators otherwise multiply in bfloat16.
    grid = jnp.einsum("yh,xw,hwd->yxd", weights, weights, grid, precision="highest")
    return jnp.concatenate([table[:1], rearrange(grid, "y x d -> (y x) d").astype(table.dtype)])


def bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the weight of each of ``old`` samples in each of ``new`` samples over the same length.

    Samples are at the centers of equal cells, the values at the border are repeated outward, and downsampling does not
    smooth first. The kernel is Keys's with ``SHARPNESS`` as ``a``.

    References:
        Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981).
            https://doi.org/10.1109/TASSP.1981.1163711

    Example:
        >>> [round(float(w), 3) for w in bicubic_weights(2, 4)[1]]
        [0.773, 0.227]
    """
    a = SHARPNESS
    at = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)[None]
    x = np.abs(at[:, None] - taps)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    kernel = np.where(x <= 1, near, far)
    weights = np.zeros((new, old))
    columns = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(weights, (np.arange(new)[:, None], columns), kernel)
    return weights.astype(np.float32)
