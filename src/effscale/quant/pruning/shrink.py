"""Make models smaller by removing masked parts."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from effscale.models import Alibi, MLPConfig, Transformer, split_groups
from effscale.models.activations import ACTIVATIONS
from effscale.models.config import BlockConfig, Group
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.packed import check_packable
from effscale.quant.pruning.rules import merge_masks, pruned_part
from effscale.quant.pruning.weight import PrunedWeight
from effscale.quant.quantizers import scale_shape

QUERIES, KEYS = ("query",), ("key", "value")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of a layer: inner features of its feed-forward, query heads, and key and value heads; None keeps all."""

    features: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The number of each."""
        parts = (self.features, self.heads, self.kv_heads)
        return tuple(None if part is None else len(part) for part in parts)


def shrink_model(model: Transformer) -> Transformer:
    """Return a smaller model with the same outputs as a pruned one.

    Feed-forward features whose row is pruned (in ``up``, or in ``up`` or ``gate`` of a gated feed-forward) are
    removed from its projections. Heads that are pruned in the output projection are removed from query, key, value
    and output. ``d_ff`` and ``num_heads`` in the config change accordingly, and ``head_dim`` stays. All other masks
    become zeros, as with ``merge_masks``.

    Layers of one group that keep different numbers become separate groups. Fake-quantized weights stay
    fake-quantized. Where their scales span inputs or blocks of outputs, the values they are computed from change, so
    continue training, or shrink before ``fake_quantize_model``.

    Args:
        model: A model from ``prune_model``. Shrink it before ``effscale.quant.quantize_model`` and ``add_lora``.

    Returns:
        A model of plain arrays with a new config, which trains like any other. It can be saved if its Hugging Face
        family supports such a config: BERT and GPT-2 have no ``head_dim`` field, so ``save_pretrained`` raises an
        error for models of these families with fewer heads.

    Raises:
        ValueError: No pruned part can be removed; pruning has not begun; the activation does not map zero to zero;
            heads use ALiBi, whose slopes depend on the number of the head; or grouped key heads keep different
            numbers of query heads.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> from effscale.quant import Pruning, PruneRule, prune_model
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=4, vocab_size=64, max_length=16)
        >>> heads = PruneRule(where="attention.out", pruning=Pruning(structure="head", dense_ratio=0.5))
        >>> pruned = prune_model(Transformer(config, rngs=nnx.Rngs(0)), (heads,))
        >>> small = shrink_model(pruned)
        >>> small.config.blocks[0].attention.num_heads, small.config.blocks[0].attention.width(16)
        (2, 4)
    """
    kept = _kept_of_layers(model)
    if not any(any(size is not None for size in one.sizes) for one in kept):
        raise ValueError(
            "nothing can be removed. Prune rows of feed_forward.up or heads of attention.out with prune_model"
        )
    model = merge_masks(split_groups(model, _changes(model, kept)))
    new: Transformer = jax.tree.map(lambda leaf: leaf, model)
    configs, first = [], 0
    for config, group in zip(model.config.groups, new.groups, strict=True):
        width = len(config.blocks)
        blocks = []
        for number, (block_config, block) in enumerate(
            zip(config.blocks, group.blocks, strict=True)
        ):
            own = kept[first + number : first + width * config.repeat : width]
            name = f"layers.{first + number}"
            blocks.append(_shrink_block(block, block_config, own, model.config.d_model, name))
        configs.append(Group(blocks=tuple(blocks), repeat=config.repeat))
        first += width * config.repeat
    new.config = dataclasses.replace(model.config, groups=tuple(configs))
    return new


def _kept_of_layers(model: Transformer) -> list[Kept]:
    """Return what each layer keeps."""
    found, first = [], 0
    for config, group in zip(model.config.groups, model.groups, strict=True):
        for repetition in range(config.repeat):
            for number, (block_config, block) in enumerate(
                zip(config.blocks, group.blocks, strict=True)
            ):
                name = f"layers.{first + number}"
                features = _features(block, block_config, repetition, name)
                heads, kv_heads = _heads(block, block_config, repetition, name, model)
                found.append(Kept(features, heads, kv_heads))
            first += len(config.blocks)
    return found


def _mask_of(dense_layer: Any, structure: str, repetition: int, name: str) -> np.ndarray | None:
    """Return the mask of a structure in one layer's kernel, or None."""
    weight: Any = None if dense_layer is None else pruned_part(dense_layer.kernel.get_value())
    while isinstance(weight, PrunedWeight):
        if weight.pruning.structure == structure:
            try:
                weight.check_finished()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            return np.asarray(weight.kept())[repetition] > 0
        weight = weight.latent
    return None


def _features(
    block: Any, config: BlockConfig, repetition: int, name: str
) -> tuple[int, ...] | None:
    if not isinstance(config.feed_forward, MLPConfig):
        return None
    inner = block.feed_forward
    up = _mask_of(inner.up, "row", repetition, f"{name}.feed_forward.up.kernel")
    gate = _mask_of(inner.gate, "row", repetition, f"{name}.feed_forward.gate.kernel")
    masks = [mask for mask in (up, gate) if mask is not None]
    if not masks:
        return None
    activation = config.feed_forward.activation
    if up is None or not config.feed_forward.gated:
        # Pruned features pass only through the activation.
        at_zero = float(ACTIVATIONS[activation](jnp.zeros(())))
        if at_zero != 0:
            raise ValueError(
                f"{name}.feed_forward: {activation} of zero is {at_zero}, so a pruned feature still contributes to the output"
            )
    kept = np.logical_and.reduce(masks)
    if not kept.any():
        raise ValueError(f"{name}.feed_forward: up and gate have no kept feature in common")
    return tuple(np.flatnonzero(kept).tolist())


def _heads(
    block: Any, config: BlockConfig, repetition: int, name: str, model: Transformer
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    mask = _mask_of(block.attention.out, "head", repetition, f"{name}.attention.out.kernel")
    if mask is None:
        return None, None
    if isinstance(model.config.positions, Alibi):
        raise ValueError(
            f"{name}.attention: ALiBi's slopes depend on the number of the head, so no head can be removed. Use merge_masks to keep zeros"
        )
    if config.attention.qk_norm is not None and config.attention.qk_norm_over == "all":
        raise ValueError(
            f"{name}.attention: queries and keys are normalized over all heads, so no head can be removed. Use merge_masks to keep zeros"
        )
    by_key = mask.reshape(config.attention.kv_heads, -1)
    counts = by_key.sum(1)
    sizes = sorted(set(counts[counts > 0].tolist()))
    if len(sizes) > 1:
        raise ValueError(
            f"{name}.attention: all remaining key heads must keep the same number of query heads, got {counts.tolist()}"
        )
    return tuple(np.flatnonzero(mask).tolist()), tuple(np.flatnonzero(counts).tolist())


def _changes(model: Transformer, kept: list[Kept]) -> list[int]:
    """Return the layers that begin a repetition whose sizes differ from those of the previous one in the same group."""
    begins, first = [], 0
    for group in model.config.groups:
        width = len(group.blocks)
        sizes = lambda start, width=width: [one.sizes for one in kept[start : start + width]]
        for start in range(first + width, first + width * group.repeat, width):
            if sizes(start) != sizes(start - width):
                begins.append(start)
        first += width * group.repeat
    return begins


def _shrink_block(
    block: Any, config: BlockConfig, kept: list[Kept], d_model: int, name: str
) -> BlockConfig:
    """Remove, in place, what no block of a stack of equal blocks keeps, and return the new config."""
    stacked = lambda part: np.array([getattr(one, part) for one in kept])
    if kept[0].features is not None:
        features = stacked("features")
        for which in ("up", "gate"):
            _take_outputs(
                getattr(block.feed_forward, which), features, f"{name}.feed_forward.{which}"
            )
        _take_inputs(block.feed_forward.down, features, f"{name}.feed_forward.down")
        smaller: Any = dataclasses.replace(cast("Any", config.feed_forward), d_ff=features.shape[1])
        config = dataclasses.replace(config, feed_forward=smaller)
    if kept[0].heads is not None:
        attention, width = config.attention, config.attention.width(d_model)
        heads, kv_heads = stacked("heads"), stacked("kv_heads")
        spread = lambda heads: (heads[..., None] * width + np.arange(width)).reshape(len(heads), -1)
        for names, which in ((QUERIES, heads), (KEYS, kv_heads)):
            for part in names:
                _take_outputs(
                    getattr(block.attention, part), spread(which), f"{name}.attention.{part}"
                )
        _take_inputs(block.attention.out, spread(heads), f"{name}.attention.out")
        is_grouped = attention.num_kv_heads is not None
        fewer = dataclasses.replace(
            attention,
            num_heads=heads.shape[1],
            num_kv_heads=kv_heads.shape[1] if is_grouped else None,
            head_dim=width,
        )
        block.attention.config = fewer
        config = dataclasses.replace(config, attention=fewer)
    return config


def _take_outputs(layer: Any, chosen: np.ndarray, name: str) -> None:
    if layer is None:
        return
    layer.kernel = layer.kernel.replace(
        _taken(layer.kernel.get_value(), chosen, 2, f"{name}.kernel")
    )
    if layer.bias is not None:
        bias = jnp.take_along_axis(layer.bias.get_value(), jnp.asarray(chosen), 1)
        layer.bias = layer.bias.replace(bias)


def _take_inputs(layer: Any, chosen: np.ndarray, name: str) -> None:
    layer.kernel = layer.kernel.replace(
        _taken(layer.kernel.get_value(), chosen, 1, f"{name}.kernel")
    )


def _taken(weight: Any, chosen: np.ndarray, axis: int, name: str) -> Any:
    """Return the chosen inputs (axis 1) or outputs (axis 2) of a stack of kernels."""
    if isinstance(weight, FakeQuantizedWeight):
        new = dataclasses.replace(weight, latent=_taken(weight.latent, chosen, axis, name))
        try:
            scale_shape(new.shape, new.format)
            check_packable(new.shape[-2], new.format, new.activations)
        except ValueError as error:
            raise ValueError(f"{name}, after shrinking: {error}") from error
        return new
    if not isinstance(weight, jax.Array | np.ndarray):
        raise ValueError(
            f"{name} is a {type(weight).__name__}. Shrink the model before packing its weights or adding LoRA pairs"
        )
    where = chosen[:, :, None] if axis == 1 else chosen[:, None, :]
    return jnp.take_along_axis(jnp.asarray(weight), jnp.asarray(where), axis)
