"""Rotary positions in ``config.json``: ``rope_parameters``, and the fields that it replaced in transformers 5."""

import math
from typing import Any

from effscale.interop.families.fields import Json
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.models import LinearScaling, Llama3Scaling, Rotary, TransformerConfig, YarnScaling
from effscale.models.rotary_scaling import RotaryScaling

LLAMA3 = ("low_freq_factor", "high_freq_factor")
YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
ORIGINAL = "original_max_position_embeddings"


def parameters(
    fields: Json,
    *,
    theta: str = "rope_theta",
    fraction: str,
    default: float,
    base: float = 10000.0,
    longest: int = 2048,
) -> Json:
    """Return the rotary parameters, from either of their places in the config.

    Args:
        fields: The fields of ``config.json``.
        theta: The older name of the base.
        fraction: The older name of the fraction of a head that rotates.
        default: Default of that fraction.
        base: Default of the base.
        longest: Default of ``max_position_embeddings``.
    """
    top = Fields("config.json", fields)
    longest = top.whole("max_position_embeddings", longest, least=1)
    # The first of the two that exists and is not empty, as in transformers.
    found = top.block(
        "rope_scaling" if fields.get("rope_scaling") else "rope_parameters",
        Fields("config.json", {}),
    )
    kind = found.text("rope_type", found.text("type", "default"))
    original = found.whole(ORIGINAL, longest, least=1)
    if kind in ("llama3", "yarn"):
        # A value next to rope_parameters takes precedence over the one inside.
        original = top.whole(ORIGINAL, original, least=1)
    return {
        "rope_type": kind,
        "rope_theta": found.number("rope_theta", top.number(theta, base)),
        "partial_rotary_factor": found.number(
            "partial_rotary_factor", top.number(fraction, default)
        ),
        ORIGINAL: original,
        "factor": found.number("factor", longest / original),
        **{name: found.number(name, None) for name in (*LLAMA3, *YARN[:-1])},
        "truncate": found.flag("truncate", "truncate" not in found.values),
    }


def scaling(found: Json) -> RotaryScaling | None:
    """Return how frequencies are scaled for longer sequences."""
    kind = found["rope_type"]
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=found["factor"])
        case "llama3":
            given = {name: Fields("config.json", found).number(name) for name in LLAMA3}
            return Llama3Scaling(
                factor=found["factor"], original_max_length=found[ORIGINAL], **given
            )
        case "yarn":
            given = {name: found[name] for name in YARN if found[name] is not None}
            return YarnScaling(factor=found["factor"], original_max_length=found[ORIGINAL], **given)
    raise FolderError(
        f"config.json: rope_type must be default, linear, llama3 or yarn, got {shown(kind)}"
    )


def arguments(found: Json) -> dict[str, Any]:
    """Return the base and the scaling as arguments of effscale."""
    return {"rotary_base": found["rope_theta"], "rotary_scaling": scaling(found)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields that describe a config's rotary positions.

    Raises:
        ValueError: It has other positions.
    """
    if not isinstance(config.positions, Rotary):
        raise ValueError(f"positions must be rotary, got {config.positions!r}")
    return fields_of(config.positions, config.blocks[0].attention.width(config.d_model))


def fields_of(rotary: Rotary, head_dim: int) -> dict[str, Any]:
    """Return ``rope_parameters``, and the maximum length if they determine it."""
    dim = head_dim if rotary.dim is None else rotary.dim
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if dim != head_dim:
        # The product with head_dim is rounded down, so it must not fall below the whole number.
        fraction = dim / head_dim
        if int(head_dim * fraction) < dim:
            fraction = math.nextafter(fraction, 1.0)
        found["partial_rotary_factor"] = fraction
    match rotary.scaling:
        case LinearScaling(factor=factor):
            found |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() | YarnScaling() as scaled:
            kind, names = ("yarn", YARN) if isinstance(scaled, YarnScaling) else ("llama3", LLAMA3)
            found |= {"rope_type": kind, "factor": scaled.factor}
            found[ORIGINAL] = scaled.original_max_length
            found |= {n: getattr(scaled, n) for n in names if getattr(scaled, n) is not None}
    fields: dict[str, Any] = {"rope_parameters": found}
    if ORIGINAL in found:
        original = found[ORIGINAL]
        longest = found["factor"] * original
        if found["rope_type"] == "llama3":
            # transformers requires it to exceed the original one, even if the factor is 1.
            fields["max_position_embeddings"] = max(math.ceil(longest), original + 1)
        else:
            # If it cannot be the product, it should have no effect, as the same number has.
            fields["max_position_embeddings"] = int(longest) if longest % 1 == 0 else original
    return fields
