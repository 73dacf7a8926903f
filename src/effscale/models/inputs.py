"""Input embeddings: turn token ids or images into the first residual stream."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models.config import PatchInputs, TokenInputs, TransformerConfig
from effscale.models.layers import Dense, Embedding, dropout
from effscale.models.positions import LearnedPositions


def _position_table(config: TransformerConfig, rngs: nnx.Rngs) -> Embedding | None:
    if not isinstance(config.positions, LearnedPositions):
        return None
    rows = config.positions.num + config.positions.offset
    return Embedding(
        rows, config.d_model, std=config.init_std, axes=("positions", "embed"), rngs=rngs
    )


class TokenEmbedding(nnx.Module):
    """Token, position and type embeddings, with projections if the token table is narrower than the model."""

    def __init__(self, config: TransformerConfig, inputs: TokenInputs, *, rngs: nnx.Rngs):
        width = config.d_model if inputs.d_embed is None else inputs.d_embed
        self.tokens = Embedding(inputs.vocab_size, width, std=config.init_std, rngs=rngs)
        self.positions = _position_table(config, rngs)
        types, axes = inputs.type_vocab_size, (None, "embed")
        self.types = (
            Embedding(types, config.d_model, std=config.init_std, axes=axes, rngs=rngs)
            if types
            else None
        )
        narrow = inputs.d_embed is not None and inputs.d_embed != config.d_model
        project = {"bias": False, "std": config.init_std, "rngs": rngs}
        self.into = (
            Dense(width, config.d_model, axes=(None, "embed"), **project) if narrow else None
        )
        self.out_of = (
            Dense(config.d_model, width, axes=("embed", None), **project) if narrow else None
        )
        self.norm = None if inputs.norm is None else inputs.norm.build(config.d_model)
        self.offset = (
            config.positions.offset if isinstance(config.positions, LearnedPositions) else 0
        )
        self.dropout = inputs.dropout
        self.dtype = config.dtype

    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        type_ids: Int[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """Return the first residual stream; a position out of range uses the nearest row of the table."""
        x = self.tokens(ids, self.dtype)
        if self.into is not None:
            x = self.into(x)
        if self.positions is not None:
            x = x + jnp.broadcast_to(self.positions(positions + self.offset, self.dtype), x.shape)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(ids) if type_ids is None else type_ids, self.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.dropout, key)

    def project_out(self, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch width"]:
        """Project hidden states to the width of the token table."""
        return hidden if self.out_of is None else self.out_of(hidden)


class PatchEmbedding(nnx.Module):
    """A class token followed by the patches of an image, row by row, with position embeddings."""

    def __init__(self, config: TransformerConfig, inputs: PatchInputs, *, rngs: nnx.Rngs):
        pixels = inputs.patch_size**2 * inputs.channels
        self.patches = Dense(
            pixels, config.d_model, std=config.init_std, axes=(None, "embed"), rngs=rngs
        )
        self.first = nnx.Param(
            config.init_std * jax.random.normal(rngs.params(), (config.d_model,)), axes=("embed",)
        )
        self.positions = _position_table(config, rngs)
        self.inputs = inputs
        self.dtype = config.dtype

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        positions: Int[Array, "rows seq"],
        type_ids: Int[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """Return the first residual stream: class token, then patches; ``type_ids`` are ignored."""
        del type_ids
        p = self.inputs.patch_size
        cut = rearrange(images.astype(self.dtype), "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        x = self.patches(cut)
        first = jnp.broadcast_to(
            self.first.get_value().astype(x.dtype)[None, None], (x.shape[0], 1, x.shape[2])
        )
        x = jnp.concatenate([first, x], axis=1)
        if self.positions is not None:
            x = x + jnp.broadcast_to(self.positions(positions, self.dtype), x.shape)
        return dropout(x, self.inputs.dropout, key)
