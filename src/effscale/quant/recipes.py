"""Recipes: which weights of a model are quantized, to what."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effscale.models import LoRA, Transformer, map_weights, split_groups
from effscale.models.name_patterns import name_search
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
from effscale.quant.quantizers import Quantized, group_scale, scale_shape

Model = TypeVar("Model", bound=nnx.Module)
Convert = Callable[[Any, Format, Format | None, list[str]], Any]
"""``convert(weight, format, activations, names)``, with the names of the weight's layers, gives what takes the weight's place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What the weights of some names become."""

    where: str
    """A regular expression that is searched in a weight's name. In the library's models names count the layers,
    ``layers.3.attention.query.kernel``, whichever group holds them; besides there are ``embed.tokens.embedding`` and
    ``heads.lm.project.kernel``. In a module of your own they are the paths of its parameters."""
    weights: Format | None
    """What the weights become; None leaves them as they are, which keeps later rules from them."""
    activations: Format | None = None
    """What the inputs of their products become; None leaves these as they are."""

    def __post_init__(self):
        if self.weights is None and self.activations is not None:
            raise ValueError(
                f"Rule({self.where!r}): activations without weights: products are then of floats"
            )
        if self.weights is not None:
            try:
                check_formats(self.weights, self.activations)
            except ValueError as error:
                raise ValueError(f"Rule({self.where!r}): {error}") from None


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""Rules in order: the first that matches a weight decides about it, and weights that none matches stay as they are.

    Example:
        >>> attention = Rule(where=r"attention\..*kernel", weights=Format(bits=8))
        >>> rest = Rule(where=r"layers\..*kernel", weights=Format(bits=4, granularity="group", group_size=16))
        >>> recipe = Recipe((attention, rest))
        >>> from effscale.models import gpt2
        >>> config = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=64, max_length=16)
        >>> small = quantize_model(Transformer(config, rngs=nnx.Rngs(0)), recipe)
    """

    rules: tuple[Rule, ...]

    def __post_init__(self):
        if not isinstance(self.rules, tuple) or not all(isinstance(r, Rule) for r in self.rules):
            raise ValueError(f"rules={self.rules!r}: must be a tuple of rules")
        if not self.rules:
            raise ValueError("a recipe needs at least one rule")


def quantize_model(
    model: Model,
    recipe: Recipe,
    *,
    grams: Mapping[str, Float[Array, "d_in d_in"]] | None = None,
    ranges: Mapping[str, InputRange] | None = None,
) -> Model:
    """A model whose weights are packed as a recipe says; it computes with them as they lie in memory.

    Of a model that was trained through `fake_quantize_model` the latent weights are packed.

    Layers of one group that get different formats are split into groups of their own (`effscale.models.split_groups`), which
    changes no value.

    Args:
        model: A model of the library, or an ``nnx`` module of your own whose kernels go through `effscale.models.matmul`
            (``nnx.Linear`` multiplies by itself and cannot take a packed kernel).
        recipe: What becomes of which weight.
        grams: From `input_grams`: the weights that it names are rounded by `gptq`, where their formats are of those that it takes,
            and all others to the nearest code.
        ranges: From `input_ranges`, for static calibration: where a rule quantizes inputs per tensor, their scale is computed once,
            from these ranges. Without it the scale of each input is computed when the input comes.

    Returns:
        The new model; the old one is untouched, and what no rule names is shared with it.

    Raises:
        ValueError: A rule has no weight left to apply to, a weight does not fit its rule's formats (the error names it), or
            ``grams`` or ``ranges`` does not fit the model.

    Example:
        >>> from effscale.models import gpt2
        >>> config = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=64, max_length=16)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> small = quantize_model(model, w8a8())
        >>> small.groups[0].blocks[0].attention.query.kernel.get_value().data.dtype
        dtype('int8')
    """
    known = {place.name for place in _places(model)}
    for option, given in (("grams", grams), ("ranges", ranges)):
        if unknown := sorted(set(given or ()) - known):
            raise ValueError(f"{option} is of another model: it names {unknown[0]}")
    inputs = [rule.activations for rule in recipe.rules if rule.activations]
    if ranges is not None and not any(format.granularity == "tensor" for format in inputs):
        raise ValueError(
            "ranges: no rule quantizes inputs per tensor, Format(granularity='tensor')"
        )

    def packed(
        weight: Any, format: Format, activations: Format | None, names: list[str]
    ) -> PackedWeight:
        is_table = names[0].endswith("embedding")
        if grams and can_gptq(format) and any(name in grams for name in names):
            check_packable(weight.shape[-2], format, activations)
            rounded = _rounded_by_inputs(weight, format, names, grams)
            found = pack_quantized(rounded, weight.dtype, activations=activations)
        else:
            found = pack_weight(weight, format, activations=activations, is_table=is_table)
        if ranges is not None and activations and activations.granularity == "tensor":
            return _with_input_scale(found, activations, names, ranges)
        return found

    return replace_weights(model, recipe, packed)


def _rounded_by_inputs(
    weight: Array, format: Format, names: list[str], grams: Mapping[str, Array]
) -> Quantized:
    """A weight, or a stack of them, rounded by `gptq`."""
    if missing := [name for name in names if name not in grams]:
        raise ValueError(f"grams has none for {missing[0]}, which is in the same stack")
    of_layers = jnp.stack([grams[name] for name in names])
    if weight.ndim == 2:
        found = gptq(weight, of_layers[0], format)
    else:
        found = jax.lax.map(lambda both: gptq(both[0], both[1], format), (weight, of_layers))
    scale = found.scale
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.isfinite(scale).all()):
        raise ValueError("its weights or the Gram matrix of its inputs are not finite")
    return found


def _with_input_scale(
    weight: PackedWeight,
    activations: Format,
    names: list[str],
    ranges: Mapping[str, InputRange],
) -> PackedWeight:
    """A weight, or a stack of them, with the scale of its inputs fixed."""
    if not all(name in ranges for name in names):
        raise ValueError("ranges has none for it")
    ends = jnp.stack([jnp.stack(ranges[name]) for name in names])
    scale, zero = jax.vmap(lambda ends: group_scale(ends[:, None], activations))(ends)
    is_stack = len(weight.shape) > 2
    stacked = lambda a: a if a is None or is_stack else a[0]
    return dataclasses.replace(weight, input_scale=stacked(scale), input_zero=stacked(zero))


def fake_quantize_model(model: Model, recipe: Recipe) -> Model:
    """A model that computes as `quantize_model` of the same recipe would, with float weights that can be trained.

    A model that was made so before gets the formats of this recipe where it has a rule, and keeps its latent weights.

    Args:
        model: As for `quantize_model`.
        recipe: What becomes of which weight.

    Raises:
        ValueError: As for `quantize_model`.

    Example:
        >>> from effscale.models import Dense
        >>> binary = Recipe((Rule(where="kernel", weights=Format(bits=1)),))
        >>> layer = fake_quantize_model(Dense(8, 4, rngs=nnx.Rngs(0)), binary)
        >>> layer.kernel.get_value().latent.shape
        (8, 4)
    """

    def fake(
        weight: Any, format: Format, activations: Format | None, names: list[str]
    ) -> FakeQuantizedWeight:
        is_table = names[0].endswith("embedding")
        # What cannot be packed after training is refused here.
        *stack, d_in, d_out = weight.mT.shape if is_table else weight.shape
        check_packable(d_in, format, activations)
        scale_shape((*stack, d_in, d_out), format)
        return FakeQuantizedWeight(weight, format, activations, is_table)

    return replace_weights(model, recipe, fake)


def dequantize_model(model: Model) -> Model:
    """A model with plain arrays in place of quantized weights, of the values that these stand for.

    Args:
        model: Any ``nnx`` module; one without quantized weights comes back as it is.
    """

    def plain(weight: Any) -> Any:
        if isinstance(weight, PackedWeight | FakeQuantizedWeight):
            return weight.dense()
        if isinstance(weight, LoRA):
            return dataclasses.replace(weight, base=plain(weight.base))
        return weight

    return map_weights(model, plain, lambda path: True)


def w8a8() -> Recipe:
    """ZeroQuant's W8A8: the layers' weights in 8 bits per output, their inputs in 8 bits per token, asymmetric.

    Inputs of one sign, as after GELU, and those of first tokens, which hold single numbers that are very large, lose much in symmetric codes;
    on SmolLM2 these cost more than twice as much (see the experiment ``zeroquant``).
    """
    return Recipe((Rule(where=LAYERS, weights=Format(), activations=TOKENS),))


def w4a8(group_size: int | None = None) -> Recipe:
    """ZeroQuant's W4/8A8: attention in 8 bits, feed-forward in 4, inputs in 8 bits per token.

    Args:
        group_size: Inputs that share a scale in the 4-bit weights; None takes all inputs of an output.
    """
    return Recipe(
        (
            Rule(where=r"layers\..*attention\..*kernel", weights=Format(), activations=TOKENS),
            Rule(where=LAYERS, weights=_grouped(4, group_size), activations=TOKENS),
        )
    )


def w4a16(group_size: int | None = None) -> Recipe:
    """ZeroQuant's W4/8A16: weights as for `w4a8`, inputs as they are."""
    rules = w4a8(group_size).rules
    return Recipe(tuple(dataclasses.replace(rule, activations=None) for rule in rules))


def w2a8() -> Recipe:
    """XTC's W2A8: ternary layers and token table, inputs of the layers in 8 bits per token."""
    return _extreme(2)


def w1a8() -> Recipe:
    """XTC's W1A8: binary layers and token table, inputs of the layers in 8 bits per token."""
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


class _Place(NamedTuple):
    """A weight's name for rules, its path in the model, and the first layer of its group's repetition; None outside of layers."""

    name: str
    path: str
    unit: int | None


def _places(model: nnx.Module) -> list[_Place]:
    """Every kernel and table of a model; one that is stacked stands there once for each of its layers."""
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    paths = [path for path in paths if path.endswith(("kernel", "embedding"))]
    if not isinstance(model, Transformer):
        return [_Place(path, path, None) for path in paths]
    places = [_Place(path, path, None) for path in paths if not path.startswith("groups.")]
    unit = 0
    for number, group in enumerate(model.config.groups):
        for _ in range(group.repeat):
            for block in range(len(group.blocks)):
                begin = f"groups.{number}.blocks.{block}."
                for path in paths:
                    if path.startswith(begin):
                        name = f"layers.{unit + block}.{path.removeprefix(begin)}"
                        places.append(_Place(name, path, unit))
            unit += len(group.blocks)
    return places


def _decisions(places: list[_Place], recipe: Recipe) -> Mapping[str, Rule]:
    """For each weight that a rule matches, its name and that rule; raises for a rule that is left without a weight."""
    names = [place.name for place in places]
    decided: dict[str, Rule] = {}
    for rule in recipe.rules:
        chosen = name_search(rule.where, names, option="where")
        new = [name for name in names if chosen(name) and name not in decided]
        if not new:
            raise ValueError(
                f"where={rule.where!r} is left without a weight: the rules before it match all of its own"
            )
        decided |= dict.fromkeys(new, rule)
    return decided


def replace_weights(model: Model, recipe: Recipe, convert: Convert) -> Model:
    """The model with its weights converted by the rules that decide about them.

    Args:
        model: As for `quantize_model`.
        recipe: What becomes of which weight.
        convert: From a weight, or the stack of a group's layers, its formats and the names of its layers, to what stands for it.
    """
    decided = _decisions(_places(model), recipe)
    if isinstance(model, Transformer):
        model = cast("Any", split_groups)(model, _begins(_places(model), decided))
    # The layers of a stack now have the same rule.
    stacks: dict[str, list[str]] = {}
    for place in _places(model):
        stacks.setdefault(place.path, []).append(place.name)
    for path, names in stacks.items():
        rule = decided.get(names[0])
        format = None if rule is None else rule.weights
        if rule is None or format is None:
            continue

        def one(
            weight: Any, names: list[str] = names, rule: Rule = rule, format: Format = format
        ) -> Any:
            name = names[0]
            if isinstance(weight, PackedWeight):
                raise ValueError(f"{name} is quantized already: dequantize_model the model first")
            if isinstance(weight, FakeQuantizedWeight):
                weight = weight.latent
            if isinstance(weight, LoRA):
                raise ValueError(
                    f"{name} has a LoRA pair: merge_lora the model, or quantize it before add_lora"
                )
            try:
                return convert(weight, format, rule.activations, names)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        model = map_weights(model, one, lambda path, wanted=path: path == wanted)
    return model


def _begins(places: list[_Place], decided: Mapping[str, Rule]) -> list[int]:
    """Layers that get other formats than the layer before them in the same stack."""
    last: dict[str, Any] = {}
    begins = set()
    for place in places:
        if place.unit is not None:
            rule = decided.get(place.name)
            formats = (None, None) if rule is None else (rule.weights, rule.activations)
            if last.get(place.path, formats) != formats:
                begins.add(place.unit)
            last[place.path] = formats
    return sorted(begins)
