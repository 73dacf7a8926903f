"""Apply pruning rules to whole models."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from flax import nnx

from effscale.models import LoRA, Transformer, Weight
from effscale.options import Options
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.places import Model, map_by_rules
from effscale.quant.pruning.masks import Pruning, Structure
from effscale.quant.pruning.weight import PrunedWeight, prune_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneRule(Options):
    """What to prune from the weights whose name matches an expression."""

    where: str
    """A regular expression to search in a weight's name, as in ``Rule``."""
    pruning: Pruning
    """What to prune, and when."""


def prune_model(model: Model, rules: Sequence[PruneRule]) -> Model:
    r"""Return a model in which parts of the weights are masked.

    For each structure (``sparse``, ``row``, ``head``), the first matching rule applies to a weight; one weight can
    have a mask of each structure. Fake-quantized weights are masked before they are rounded, no matter which was
    applied first. Layers of one group that get different rules are split into separate groups.

    Train the result with ``scheduled_step``. Then ``merge_masks`` writes the zeros into the weights, ``shrink_model``
    removes pruned rows of the feed-forward and pruned heads, and ``effscale.quant.quantize_model`` packs what is
    left.

    Args:
        model: A model of this library, or your own ``nnx`` module whose kernels go through
            ``effscale.models.matmul``.
        rules: What to prune in which weight. Rows can be pruned in kernels, heads in output projections of attention.

    Returns:
        The new model; the original is unchanged.

    Raises:
        ValueError: A rule has no weight left to apply to, or a weight has no such units, or is packed.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.models import Dense
        >>> half = PruneRule(where="kernel", pruning=Pruning(structure="row", dense_ratio=0.5))
        >>> layer = prune_model(Dense(8, 4, rngs=nnx.Rngs(0)), (half,))
        >>> int((layer(jnp.ones((1, 8))) != 0).sum())
        2

    References:
        DeepSpeed, "DeepSpeed Model Compression Library", tutorial.
            https://www.deepspeed.ai/tutorials/model-compression/
    """
    for structure in get_args(Structure):
        own = [rule for rule in rules if rule.pruning.structure == structure]
        if own:
            model = _prune(model, own)
    return model


def _prune(model: Model, rules: Sequence[PruneRule]) -> Model:
    """Apply the rules of one structure."""
    heads = _heads_of_outputs(model)

    def one(weight: Any, rule: PruneRule, names: list[str]) -> Any:
        pruning = rule.pruning
        if pruning.structure != "sparse" and names[0].endswith("embedding"):
            raise ValueError(
                f"structure={pruning.structure!r} can only prune kernels, and this is an embedding table"
            )
        if pruning.structure == "head":
            pruning = _with_heads(pruning, heads, names[0])
        return masked(weight, pruning)

    kind = lambda rule: None if rule is None else rule.pruning
    return map_by_rules(model, rules, one, kind=kind)


def masked(weight: Any, pruning: Pruning) -> Any:
    """Return a weight with a mask; for a fake-quantized weight, the mask is inside."""
    if isinstance(weight, FakeQuantizedWeight):
        if weight.format.bits == 1:
            raise ValueError(
                "it is binary, and binary codes have no zero for pruned values. Use 2 bits or more"
            )
        return dataclasses.replace(weight, latent=masked(weight.latent, pruning))
    if isinstance(weight, LoRA):
        raise ValueError("it has a LoRA pair. Call merge_lora on the model first")
    if isinstance(weight, PrunedWeight):
        inner: Any = weight
        while isinstance(inner, PrunedWeight):
            if inner.pruning.structure == pruning.structure:
                raise ValueError(
                    f"it already has a {pruning.structure} mask. Call merge_masks first"
                )
            inner = inner.latent
    elif isinstance(weight, Weight):
        raise ValueError(
            f"a {type(weight).__name__} cannot be pruned. Prune the model before packing its weights"
        )
    return prune_weight(weight, pruning)


def _heads_of_outputs(model: nnx.Module) -> dict[str, int] | None:
    """Return the number of heads by name of output projection; None for user-defined modules."""
    if not isinstance(model, Transformer):
        return None
    blocks = [b for group in model.config.groups for b in group.blocks * group.repeat]
    return {
        f"layers.{number}.attention.out.kernel": block.attention.num_heads
        for number, block in enumerate(blocks)
    }


def _with_heads(pruning: Pruning, heads: dict[str, int] | None, name: str) -> Pruning:
    if heads is None:
        return pruning
    if name not in heads:
        raise ValueError(
            "structure='head' can only prune layers.*.attention.out.kernel, whose inputs are heads"
        )
    if pruning.num_heads not in (None, heads[name]):
        raise ValueError(
            f"num_heads must be the model's {heads[name]} or None, got {pruning.num_heads}"
        )
    return dataclasses.replace(pruning, num_heads=heads[name])


def pruned_part(weight: Any) -> PrunedWeight | None:
    """Return the masked matrix in a weight, or None."""
    if isinstance(weight, FakeQuantizedWeight):
        weight = weight.latent
    return weight if isinstance(weight, PrunedWeight) else None


def mask_biases(model: Model) -> Model:
    """Return the model with zeros in the biases of pruned rows; biases of kernels whose mask is not active yet are unchanged."""
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in list(flat.items()):
        pruned, bias = pruned_part(variable.get_value()), (*path[:-1], "bias")
        if path[-1] == "kernel" and pruned is not None and bias in flat:
            flat[bias] = flat[bias].replace(pruned.masked_bias(flat[bias].get_value()))
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))


def merge_masks(model: Model) -> Model:
    """Replace pruned weights with plain arrays that have zeros in the pruned places, in biases too.

    Call this before saving: files always hold weights with their zeros, but biases as they are in the model.
    Fake-quantized weights stay fake-quantized, without a mask.

    Args:
        model: A model from ``prune_model``; a model without pruned weights is returned unchanged.

    Raises:
        ValueError: Pruning has not begun in a weight; the error names it.
    """
    graphdef, state = nnx.split(mask_biases(model))
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        try:
            leaves.append((path, variable.replace(_plain(variable.get_value()))))
        except ValueError as error:
            raise ValueError(f"{'.'.join(map(str, path))}: {error}") from error
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _plain(weight: Any) -> Any:
    if isinstance(weight, FakeQuantizedWeight):
        return dataclasses.replace(weight, latent=_plain(weight.latent))
    if not isinstance(weight, PrunedWeight):
        return weight
    weight.check_finished()
    return weight.dense()
