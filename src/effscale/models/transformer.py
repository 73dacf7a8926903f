"""The Transformer: inputs, groups of layers, a final norm, and heads."""

import dataclasses
import typing
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.models.block import BlockGroup
from effscale.models.cache import KVCache
from effscale.models.config import TokenInputs, TransformerConfig
from effscale.models.context import Context, angles_of, build_context, positions_of
from effscale.models.inputs import PatchEmbedding, TokenEmbedding
from effscale.models.layers import Dense
from effscale.models.points import Capture, captures
from effscale.models.reports import AUX_LOSS, aux_loss
from effscale.parallel import constrain

RunGroup = Callable[..., tuple[Array, Any, Any]]
"""A function that runs a group of layers, with the signature of ``effscale.models.run_group``."""


def run_group(
    index: int, group: BlockGroup, x: Array, context: Context, cache: Any, key: PRNGKeyArray | None
):
    """Run a group of layers the default way: all layers, on all tokens."""
    del index
    return group(x, context, cache, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also builds it from shapes and placeholders
class Encoded:
    """The output of the trunk.

    Attributes:
        hidden: The residual stream after the final norm, projected to the embedding's width if that differs.
        cache: The updated cache, if one was passed.
        reports: For each block of each group, what its feed-forward reported, with a leading layer dimension.
        captured: What ``capture`` asked for, in the same structure; ``effscale.models.by_layer`` stacks the layers.
    """

    hidden: Float[Array, "batch seq d_model"]
    cache: KVCache | None
    reports: tuple[Any, ...]
    captured: tuple[Any, ...] = ()


class Transformer(nnx.Module):
    """A transformer defined by its config.

    It is a plain pytree: pass it through ``jax.jit``, ``jax.grad`` and optax directly. It holds no random state; to use
    dropout, pass a key.

    Args:
        config: The config of the model.
        rngs: Random streams for the initial values.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 50)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        inputs = config.inputs
        if isinstance(inputs, TokenInputs):
            self.embed = TokenEmbedding(config, inputs, rngs=rngs)
        else:
            self.embed = PatchEmbedding(config, inputs, rngs=rngs)
        self.groups = nnx.List([BlockGroup(group, config, rngs=rngs) for group in config.groups])
        self.final_norm = (
            None if config.final_norm is None else config.final_norm.build(config.d_model)
        )
        width, std = config.hidden_width, config.init_std
        self.pooler = (
            Dense(width, width, std=std, axes=("embed", None), rngs=rngs) if config.pooler else None
        )
        self.heads: Any = nnx.Dict(
            {head.name: head.build(config, rngs=rngs) for head in config.heads}
        )
        self.config = config

    def __call__(
        self,
        inputs: Int[Array, "batch seq"] | Float[Array, "batch height width channels"],
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "rows seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        type_ids: Int[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        run_group: RunGroup = run_group,
    ) -> Any:
        """Return the model's outputs without the reports of its layers; with a ``key``, it warns if this drops an ``aux_loss``.

        Args:
            inputs: Token ids, or images with the value range the model was trained on.
            attention_mask: ``(batch, seq)``, nonzero at real tokens; None: all are real.
            positions: Position of each token. By default, real tokens are counted from 0, on whichever side the padding is,
                and from 0 in each segment.
            segment_ids: For packed rows: a token attends only to tokens with the same number; 0 is padding. By default,
                positions count from 0 in each segment.
            type_ids: Type of each token, for models with token types; by default 0.
            key: Key for dropout; None disables dropout.
            run_group: How to run a group of layers; see ``encode``.

        Returns:
            Logits of shape ``(batch, seq, vocab)`` for a model whose only head is ``lm``. Otherwise a dict with
            ``hidden``, ``pooled`` if there is a pooler, and each head's output under its name.

        Raises:
            ValueError: The sequence is longer than the model's positions, an image has another size, or ``type_ids`` is
                passed to a model without token types.
        """
        encoded = self.encode(
            inputs,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            type_ids=type_ids,
            key=key,
            run_group=run_group,
        )
        if key is not None and aux_loss(encoded.reports) is not None:
            warnings.warn(
                f"model(...) returns only the outputs and drops the {AUX_LOSS} that its feed-forwards report. To train, use an "
                "objective of effscale.training, or encode(...), outputs(...) and effscale.training.add_reports",
                stacklevel=2,
            )
        valid = None if attention_mask is None else attention_mask.astype(bool)
        return self.outputs(encoded.hidden, valid, key)

    def outputs(
        self,
        hidden: Float[Array, "batch seq d_model"],
        valid: Bool[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """Apply the heads to hidden states.

        Args:
            hidden: From ``encode``.
            valid: True at real tokens; None: all are real.
            key: Key for dropout; it may be the key passed to ``encode``.

        Returns:
            The same as ``__call__``.
        """
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(hidden[:, 0], self.config.pooler_activation)

        def key_of(name: str) -> PRNGKeyArray | None:
            # Derived from the name: distinct from the layers' keys, and independent of the other heads.
            return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))

        outputs = {
            name: head(hidden, pooled, self.embed, valid, key_of(name))
            for name, head in self.heads.items()
        }
        if set(outputs) == {"lm"}:
            return constrain(outputs["lm"], "batch", "seq", "vocab_act")
        return {"hidden": hidden} | ({} if pooled is None else {"pooled": pooled}) | outputs

    def encode(
        self,
        inputs: Int[Array, "batch seq"] | Float[Array, "batch height width channels"],
        *,
        attention_mask: Array | None = None,
        positions: Int[Array, "rows seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        type_ids: Int[Array, "batch seq"] | None = None,
        cache: KVCache | None = None,
        key: PRNGKeyArray | None = None,
        run_group: RunGroup = run_group,
        capture: Capture = (),
    ) -> Encoded:
        """Run everything up to the heads.

        Args:
            inputs: As in ``__call__``.
            attention_mask: As in ``__call__``.
            positions: As in ``__call__``.
            segment_ids: As in ``__call__``; cannot be combined with a cache.
            type_ids: As in ``__call__``.
            cache: Keys and values of earlier tokens. ``inputs`` and ``attention_mask`` then hold only the tokens that
                follow. The cache must have room for them: a full one overwrites its last slots.
            key: Key for dropout; None disables dropout.
            run_group: How to run a group of layers: maps ``(index, group, x, context, cache, key)`` to
                ``(x, cache, reports)``. Techniques that drop tokens or layers hook in here.
            capture: Points of each layer to return as ``captured``, such as ``("layer_in", "attention_scores")``; or a
                mapping from each point to a function of its array, such as the range. Valid names are ``config.points``
                and ``attention_scores``: ``q k^T``, scaled, before bias, masks and softmax.

        Returns:
            Hidden states, updated cache, reports, and captured points.

        Raises:
            ValueError: As in ``__call__``; or ``inputs`` has more tokens than the cache has slots, or ``capture``
                names an unknown point.
        """
        config = self.config
        seq = self._length(inputs)
        if type_ids is not None and getattr(config.inputs, "type_vocab_size", 0) == 0:
            raise ValueError(
                "type_ids needs a model with token types: set type_vocab_size of its inputs above 0"
            )
        valid = None if attention_mask is None else attention_mask.astype(bool)
        if cache is None:
            context = build_context(
                seq,
                kind=config.positions,
                head_dim=config.groups[0].blocks[0].attention.width(config.d_model),
                causal=config.causal,
                valid=valid,
                positions=positions,
                segments=segment_ids,
            )
        else:
            if segment_ids is not None:
                raise ValueError(
                    "segment_ids cannot be combined with a cache: a cached row is one segment"
                )
            cache, context = self._advance(cache, inputs.shape[0], seq, valid, positions)
        if capture:
            context = dataclasses.replace(context, capture=captures(capture, config.points))
        keys = (
            (None,) * (1 + len(self.groups))
            if key is None
            else tuple(jax.random.split(key, 1 + len(self.groups)))
        )
        x = self.embed(inputs, context.positions, type_ids, keys[0])
        x = constrain(x, "batch", "seq", "embed_act")
        layers, reports = [], []
        for index, group in enumerate(self.groups):
            depth = group.repeat * len(group.blocks)
            taken = None if cache is None else cache.layers[len(layers) : len(layers) + depth]
            x, taken, report = run_group(index, group, x, context, taken, keys[1 + index])
            layers.extend(taken or ())
            reports.append(report)
        if self.final_norm is not None:
            x = self.final_norm(x)
        if isinstance(self.embed, TokenEmbedding):
            x = self.embed.project_out(x)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=tuple(layers))
        names = {name for name, _ in context.capture}
        return Encoded(x, cache, *_apart(tuple(reports), names))

    def _length(self, inputs: Array) -> int:
        config = self.config
        if isinstance(config.inputs, TokenInputs):
            if config.max_length is not None and inputs.shape[1] > config.max_length:
                raise ValueError(
                    f"the sequence length must be at most the model's {config.max_length} positions, got {inputs.shape[1]}"
                )
            return inputs.shape[1]
        size, channels = config.inputs.image_size, config.inputs.channels
        if inputs.shape[1:] != (size, size, channels):
            raise ValueError(
                f"images must have the shape {(size, size, channels)}, got {inputs.shape[1:]}"
            )
        return config.inputs.num_tokens

    def _advance(
        self, cache: KVCache, batch: int, seq: int, valid: Array | None, positions: Array | None
    ) -> tuple[KVCache, Context]:
        """Write the positions of the new tokens into the next slots of the cache, and let them attend to all slots so far."""
        if seq > cache.valid.shape[1]:
            raise ValueError(
                f"inputs must have at most the cache's {cache.valid.shape[1]} slots, got {seq} tokens"
            )
        new = jnp.ones((batch, seq), bool) if valid is None else valid
        if positions is None:
            positions = positions_of(new) + cache.valid.sum(1, dtype=jnp.int32)[:, None]
        positions = jnp.broadcast_to(positions, (batch, seq))
        write = lambda old, value: jax.lax.dynamic_update_slice_in_dim(
            old, value.astype(old.dtype), cache.length, 1
        )
        start = cache.length
        cache = dataclasses.replace(
            cache,
            positions=write(cache.positions, positions),
            valid=write(cache.valid, new),
            length=cache.length + seq,
        )
        config = self.config
        context = Context(
            positions=positions,
            key_positions=cache.positions,
            valid=valid,
            key_valid=cache.valid,
            segments=None,
            key_segments=None,
            start=start,
            angles=angles_of(
                config.positions,
                positions,
                config.groups[0].blocks[0].attention.width(config.d_model),
            ),
            causal=config.causal,
            cached=True,
        )
        return cache, context


def _apart(reports: tuple[Any, ...], names: set[str]) -> tuple[Any, ...]:
    """Split reports into those without the entries ``names`` and these entries."""
    if not names:
        return reports, ()
    pick = lambda wanted: tuple(
        tuple({n: v for n, v in block.items() if (n in names) == wanted} for block in blocks)
        for blocks in reports
    )
    return pick(False), pick(True)
