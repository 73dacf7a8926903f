"""Recipes: which weights of a model to quantize, and to which formats."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.models import LoRA, map_weights
from effscale.models.weights import dense, transpose
from effscale.options import Bounds, Options
from effscale.quant.bit_schedules import BitSchedule, check_schedule
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.formats import Format
from effscale.quant.gram_rounding import can_gptq, gptq
from effscale.quant.inputs import InputRange
from effscale.quant.packed import (
    PackedWeight,
    check_formats,
    check_packable,
    pack_quantized,
    pack_weight,
)
from effscale.quant.places import Model, map_by_rules, places
from effscale.quant.pruning.rules import mask_biases
from effscale.quant.pruning.weight import PrunedWeight
from effscale.quant.quantizers import Quantized, group_scale, scale_shape

Convert = Callable[[Any, "Rule", list[str]], Any]
"""``convert(weight, rule, names)``, with the names of the weight in its layers, returns the replacement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Options):
    """Formats for the weights whose name matches an expression."""

    where: str
    """A regular expression to search in a weight's name. In this library's models, names count the layers across groups:
    ``layers.3.attention.query.kernel``. Others are ``embed.tokens.embedding`` and ``heads.lm.project.kernel``. In your own modules, names are
    the paths of the parameters."""
    weights: Format | None
    """Format of the weights; None leaves them unquantized, and later rules do not apply to them either."""
    activations: Format | None = None
    """Format of the inputs of their products; None leaves the inputs unquantized."""
    schedule: BitSchedule | None = None
    """During training, the bits on the way to those of ``weights``; None uses the final bits from the start. See ``scheduled_step``."""
    activations_offset: Annotated[int, Bounds(at_least=0, below=2**31)] = 0
    """During training, optimizer steps before inputs are rounded."""

    def __post_init__(self):
        super().__post_init__()
        for option in ("activations", "schedule"):
            if self.weights is None and getattr(self, option) is not None:
                raise ValueError(
                    f"Rule({self.where!r}): {option} must be left at its default if weights is None"
                )
        if self.weights is not None:
            try:
                check_formats(self.weights, self.activations)
                if self.schedule is not None:
                    check_schedule(self.schedule, self.weights)
            except ValueError as error:
                raise ValueError(f"Rule({self.where!r}): {error}") from None


@dataclasses.dataclass(frozen=True)
class Recipe(Options):
    r"""Rules in order: the first one that matches a weight applies to it, and weights that no rule matches stay unquantized.

    Example:
        >>> attention = Rule(where=r"attention\..*kernel", weights=Format(bits=8))
        >>> rest = Rule(where=r"layers\..*kernel", weights=Format(bits=4, granularity="group", group_size=16))
        >>> recipe = Recipe((attention, rest))
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> config = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=64, max_length=16)
        >>> small = quantize_model(Transformer(config, rngs=nnx.Rngs(0)), recipe)
    """

    rules: Annotated[tuple[Rule, ...], Bounds(at_least=1)]


def quantize_model(
    model: Model,
    recipe: Recipe,
    *,
    grams: Mapping[str, Float[Array, "d_in d_in"]] | None = None,
    ranges: Mapping[str, InputRange] | None = None,
) -> Model:
    """Return a model whose weights are packed according to a recipe, and that computes directly with them.

    If the model was trained after ``fake_quantize_model``, its latent weights are packed; if it comes from
    ``prune_model``, its masked weights and biases.

    Layers of one group that get different formats are split into separate groups (``effscale.models.split_groups``),
    which changes no values.

    Args:
        model: A model of this library, or your own ``nnx`` module whose kernels go through ``effscale.models.matmul``
            (``nnx.Linear`` does its own multiplication and cannot use a packed kernel).
        recipe: The formats of each weight.
        grams: Gram matrices from ``input_grams``. The weights that they name are rounded by ``gptq`` if it supports
            their formats, and all others to the nearest code.
        ranges: Ranges from ``input_ranges``, for static calibration: where a rule quantizes inputs per tensor, their
            scale is computed once, from these ranges. If None, the scale of each input is computed from the input.

    Returns:
        The new model. The original is unchanged; parameters that no rule matches are shared with it.

    Raises:
        ValueError: ``recipe`` is not a Recipe, a rule has no weight left to apply to, a weight does not match its rule's formats (the error names
            it), or ``grams`` or ``ranges`` does not match the model. Also if a bit schedule or a mask has not reached
            its end, because the packed weights would then differ from those that were trained.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> config = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=64, max_length=16)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> small = quantize_model(model, w8a8())
        >>> small.groups[0].blocks[0].attention.query.kernel.get_value().data.dtype
        dtype('int8')
    """
    if not isinstance(recipe, Recipe):
        call = f". Call it: {recipe.__name__}()" if callable(recipe) else ""
        raise ValueError(f"recipe must be a Recipe, got {recipe!r}{call}")
    known = {place.name for place in places(model)}
    for option, given in (("grams", grams), ("ranges", ranges)):
        if unknown := sorted(set(given or ()) - known):
            raise ValueError(
                f"{option} belongs to another model: this model has no weight {unknown[0]}"
            )
    inputs = [rule.activations for rule in recipe.rules if rule.activations]
    if ranges is not None and not any(format.granularity == "tensor" for format in inputs):
        raise ValueError(
            "ranges must be None if no rule quantizes inputs per tensor. To use ranges, set activations=Format(granularity='tensor') in a rule"
        )

    def packed(weight: Any, rule: Rule, names: list[str]) -> PackedWeight:
        format, activations = cast("Format", rule.weights), rule.activations
        is_table, weight = names[0].endswith("embedding"), dense(weight)
        if grams and can_gptq(format) and any(name in grams for name in names):
            check_packable(weight.shape[-2], format, activations)
            rounded = _rounded_by_inputs(weight, format, names, grams)
            found = pack_quantized(rounded, weight.dtype, activations=activations)
        else:
            found = pack_weight(weight, format, activations=activations, is_table=is_table)
        if ranges is not None and activations and activations.granularity == "tensor":
            return _with_input_scale(found, activations, names, ranges)
        return found

    return replace_weights(mask_biases(model), recipe, packed, to_pack=True)


def _rounded_by_inputs(
    weight: Array, format: Format, names: list[str], grams: Mapping[str, Array]
) -> Quantized:
    """Round a weight, or a stack of weights, with ``gptq``."""
    if missing := [name for name in names if name not in grams]:
        raise ValueError(f"grams must have an entry for {missing[0]}, which is in the same stack")
    of_layers = jnp.stack([grams[name] for name in names])
    if weight.ndim == 2:
        found = gptq(weight, of_layers[0], format)
    else:
        found = _gptq_of_stack(weight, of_layers, format)
    scale = found.scale
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.isfinite(scale).all()):
        raise ValueError("its weights or the Gram matrix of its inputs are not finite")
    return found


@functools.partial(jax.jit, static_argnums=2)
def _gptq_of_stack(weights: Array, grams: Array, format: Format) -> Quantized:
    """Round each matrix of a stack with ``gptq``; compiled once for all stacks of a shape."""
    return jax.lax.map(lambda both: gptq(both[0], both[1], format), (weights, grams))


def _with_input_scale(
    weight: PackedWeight,
    activations: Format,
    names: list[str],
    ranges: Mapping[str, InputRange],
) -> PackedWeight:
    """Fix the input scale of a weight, or of a stack of weights."""
    if not all(name in ranges for name in names):
        raise ValueError("ranges must have an entry for it")
    ends = jnp.stack([jnp.stack(ranges[name]) for name in names])
    scale, zero = jax.vmap(lambda ends: group_scale(ends[:, None], activations))(ends)
    is_stack = len(weight.shape) > 2
    stacked = lambda a: a if a is None or is_stack else a[0]
    return dataclasses.replace(weight, input_scale=stacked(scale), input_zero=stacked(zero))


def fake_quantize_model(model: Model, recipe: Recipe) -> Model:
    """Return a trainable model in float weights that computes like ``quantize_model`` with the same recipe.

    If the model is already fake-quantized, weights that a rule matches get the formats of this recipe and keep their
    latent weights. Pruned weights stay pruned: they are masked first and then rounded.

    Args:
        model: As for ``quantize_model``.
        recipe: The formats of each weight.

    Raises:
        ValueError: As for ``quantize_model``.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Dense
        >>> binary = Recipe((Rule(where="kernel", weights=Format(bits=1)),))
        >>> layer = fake_quantize_model(Dense(8, 4, rngs=nnx.Rngs(0)), binary)
        >>> layer.kernel.get_value().latent.shape
        (8, 4)
    """

    def fake(weight: Any, rule: Rule, names: list[str]) -> FakeQuantizedWeight:
        format, activations = cast("Format", rule.weights), rule.activations
        is_table = names[0].endswith("embedding")
        # Raise now for what could not be packed after training.
        *stack, d_in, d_out = (transpose(weight) if is_table else weight).shape
        check_packable(d_in, format, activations)
        scale_shape((*stack, d_in, d_out), format)
        counts = rule.schedule is not None or rule.activations_offset > 0
        return FakeQuantizedWeight(
            weight,
            format,
            activations,
            is_table,
            schedule=rule.schedule,
            activations_offset=rule.activations_offset,
            step=jnp.zeros(stack, jnp.int32) if counts else None,
        )

    return replace_weights(model, recipe, fake, to_pack=False)


def dequantize_model(model: Model) -> Model:
    """Replace quantized weights with plain arrays of the values they represent.

    Args:
        model: Any ``nnx`` module; one without quantized weights is returned unchanged. Biases of pruned rows become
            zero.
    """

    def plain(weight: Any) -> Any:
        if isinstance(weight, PackedWeight | FakeQuantizedWeight):
            return weight.dense()
        if isinstance(weight, LoRA):
            return dataclasses.replace(weight, base=plain(weight.base))
        return weight

    return map_weights(mask_biases(model), plain, lambda path: True)


def w8a8() -> Recipe:
    """Return ZeroQuant's W8A8: layer weights in 8 bits, inputs in asymmetric 8 bits.

    Weights have one scale per output; inputs have a scale and a zero point per token. Symmetric codes lose much precision for inputs of mostly one sign, such as after GELU, and for the inputs of first
    tokens, which have a few very large values. On SmolLM2 symmetric codes cost more than twice as much (see the
    experiment ``zeroquant``).
    """
    return Recipe((Rule(where=LAYERS, weights=Format(), activations=TOKENS),))


def w4a8(group_size: int | None = None) -> Recipe:
    """Return ZeroQuant's W4/8A8: attention in 8 bits, feed-forward in 4 bits, inputs in 8 bits per token.

    Args:
        group_size: Number of inputs that share a scale in the 4-bit weights; None uses one scale per output.
    """
    return Recipe(
        (
            Rule(where=r"layers\..*attention\..*kernel", weights=Format(), activations=TOKENS),
            Rule(where=LAYERS, weights=_grouped(4, group_size), activations=TOKENS),
        )
    )


def w4a16(group_size: int | None = None, *, attention_bits: Literal[4, 8] = 8) -> Recipe:
    """Return ZeroQuant's W4/8A16: weights as for ``w4a8``, inputs unquantized.

    Args:
        group_size: As for ``w4a8``.
        attention_bits: Bits of attention. With 4, every layer has the same format, which vLLM also runs on CPUs.
    """
    if attention_bits not in (4, 8):
        raise ValueError(f"attention_bits must be 4 or 8, got {attention_bits!r}")
    rules = w4a8(group_size).rules[1 if attention_bits == 4 else 0 :]
    return Recipe(tuple(dataclasses.replace(rule, activations=None) for rule in rules))


def w2a8() -> Recipe:
    """Return XTC's W2A8: ternary layers and token embeddings, inputs of the layers in 8 bits per token."""
    return _extreme(2)


def w1a8() -> Recipe:
    """Return XTC's W1A8: binary layers and token embeddings, inputs of the layers in 8 bits per token."""
    return _extreme(1)


LAYERS = r"layers\..*kernel"
TOKENS = Format(granularity="token", symmetric=False)


def _extreme(bits: int) -> Recipe:
    weights, inputs = Format(bits=bits, granularity="tensor"), Format(granularity="token")
    return Recipe(
        (
            Rule(where=LAYERS, weights=weights, activations=inputs),
            Rule(where=r"embed\.tokens\.embedding", weights=Format(bits=bits)),
        )
    )


def _grouped(bits: int, group_size: int | None) -> Format:
    if group_size is None:
        return Format(bits=bits)
    return Format(bits=bits, granularity="group", group_size=group_size)


def replace_weights(model: Model, recipe: Recipe, convert: Convert, *, to_pack: bool) -> Model:
    """Return the model with its weights converted by the rules that apply to them; to be packed, weights must have ended their schedules."""

    def one(weight: Any, rule: Rule, names: list[str]) -> Any:
        if rule.weights is None:
            return weight
        if isinstance(weight, PackedWeight):
            raise ValueError("it is already quantized. Call dequantize_model on the model first")
        latent = weight.latent if isinstance(weight, FakeQuantizedWeight) else weight
        if isinstance(latent, LoRA):
            raise ValueError(
                "it has a LoRA pair. Call merge_lora on the model, or quantize it before add_lora"
            )
        if isinstance(latent, PrunedWeight) and rule.weights.bits == 1:
            raise ValueError("it is pruned, and binary codes have no zero. Use 2 bits or more")
        if to_pack and isinstance(weight, FakeQuantizedWeight | PrunedWeight):
            weight.check_finished()
        return convert(latent, rule, names)

    kind = lambda rule: (
        None if rule is None or rule.weights is None else dataclasses.replace(rule, where="")
    )
    return map_by_rules(model, recipe.rules, one, kind=kind)
