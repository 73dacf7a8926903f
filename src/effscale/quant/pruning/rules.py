"""Rules of pruning on whole models."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from flax import nnx

from effscale.models import LoRA, Transformer, Weight
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.places import Model, map_by_rules
from effscale.quant.pruning.masks import Pruning, Structure
from effscale.quant.pruning.weight import PrunedWeight, prune_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneRule:
    """What of the weights of some names is pruned."""

    where: str
    """A regular expression that is searched in a weight's name, as in `Rule`."""
    pruning: Pruning
    """What of them, and when."""


def prune_model(model: Model, rules: Sequence[PruneRule]) -> Model:
    r"""A model in which a part of the weights is masked.

    Of each structure (``sparse``, ``row``, ``head``) a weight gets the first rule that matches; one weight may have a mask of each.
    Fake-quantized weights are masked before they are rounded, whichever of the two came first. Layers of one group that get different
    rules are split into groups of their own.

    Train the result with `scheduled_step`. Then `merge_masks` puts zeros in place, `shrink_model` takes pruned rows of the feed-forward and
    pruned heads out, and `effscale.quant.quantize_model` packs what is left.

    Args:
        model: A model of the library, or an ``nnx`` module of your own whose kernels go through `effscale.models.matmul`.
        rules: What is pruned in which weight. Rows are those of kernels; heads those of output projections of attention.

    Returns:
        The new model; the old one is untouched.

    Raises:
        ValueError: A rule has no weight left to apply to, or a weight has no such parts, or is packed.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.models import Dense
        >>> half = PruneRule(where="kernel", pruning=Pruning(structure="row", dense_ratio=0.5))
        >>> layer = prune_model(Dense(8, 4, rngs=nnx.Rngs(0)), (half,))
        >>> int((layer(jnp.ones((1, 8))) != 0).sum())
        2

    References:
        DeepSpeed's `compression tutorial <https://www.deepspeed.ai/tutorials/model-compression/>`_
    """
    for structure in get_args(Structure):
        own = [rule for rule in rules if rule.pruning.structure == structure]
        if own:
            model = _prune(model, own)
    return model


def _prune(model: Model, rules: Sequence[PruneRule]) -> Model:
    """Rules of one structure."""
    heads = _heads_of_outputs(model)

    def one(weight: Any, rule: PruneRule, names: list[str]) -> Any:
        pruning = rule.pruning
        if pruning.structure != "sparse" and names[0].endswith("embedding"):
            raise ValueError(f"structure={pruning.structure!r} is of kernels, and this is a table")
        if pruning.structure == "head":
            pruning = _with_heads(pruning, heads, names[0])
        return masked(weight, pruning)

    kind = lambda rule: None if rule is None else rule.pruning
    return map_by_rules(model, rules, one, kind=kind)


def masked(weight: Any, pruning: Pruning) -> Any:
    """A weight with a mask; inside of one that is fake-quantized."""
    if isinstance(weight, FakeQuantizedWeight):
        if weight.format.bits == 1:
            raise ValueError(
                "it is binary, and has no zero for what is pruned: take 2 bits or more"
            )
        return dataclasses.replace(weight, latent=masked(weight.latent, pruning))
    if isinstance(weight, LoRA):
        raise ValueError("it has a LoRA pair: merge_lora the model first")
    if isinstance(weight, PrunedWeight):
        inner: Any = weight
        while isinstance(inner, PrunedWeight):
            if inner.pruning.structure == pruning.structure:
                raise ValueError(f"it has a {pruning.structure} mask already: merge_masks first")
            inner = inner.latent
    elif isinstance(weight, Weight):
        raise ValueError(f"a {type(weight).__name__} cannot be pruned: do it before it is packed")
    return prune_weight(weight, pruning)


def _heads_of_outputs(model: nnx.Module) -> dict[str, int] | None:
    """Heads by the names of output projections; None in modules of a user's own."""
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
            "structure='head' is of layers.*.attention.out.kernel, whose inputs are heads"
        )
    if pruning.num_heads not in (None, heads[name]):
        raise ValueError(f"num_heads={pruning.num_heads}: the model has {heads[name]} there")
    return dataclasses.replace(pruning, num_heads=heads[name])


def pruned_part(weight: Any) -> PrunedWeight | None:
    """The masked matrix in a weight, if there is one."""
    if isinstance(weight, FakeQuantizedWeight):
        weight = weight.latent
    return weight if isinstance(weight, PrunedWeight) else None


def mask_biases(model: Model) -> Model:
    """The model with zeros in the biases whose rows are pruned; where a kernel's mask is not in force yet, they stay."""
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in list(flat.items()):
        pruned, bias = pruned_part(variable.get_value()), (*path[:-1], "bias")
        if path[-1] == "kernel" and pruned is not None and bias in flat:
            flat[bias] = flat[bias].replace(pruned.masked_bias(flat[bias].get_value()))
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))


def merge_masks(model: Model) -> Model:
    """The model with plain arrays in place of pruned weights, with zeros where these are pruned, in biases, too.

    Save it so: files hold weights with their zeros in any case, but biases as they lie in the model. Fake-quantized weights stay so,
    without a mask.

    Args:
        model: From `prune_model`; one without pruned weights comes back as it is.

    Raises:
        ValueError: Pruning has not begun in some weight, which the error names.
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
