"""Rotary positions in ``config.json``: ``rope_parameters``, and the fields that it replaced in transformers 5."""

import math
from typing import Any

from effscale.interop.families.family import Json
from effscale.interop.tensors import FolderError
from effscale.models import LinearScaling, Llama3Scaling, Rotary, YarnScaling
from effscale.models.config import RotaryScaling

YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def parameters(fields: Json, *, theta: str = "rope_theta", fraction: str, default: float) -> Json:
    """The parameters, wherever the config has them.

    Args:
        fields: Of ``config.json``.
        theta: The older name of the base.
        fraction: The older name of the share of a head that rotates.
        default: That share, where nothing tells it.
    """
    longest = fields.get("max_position_embeddings") or 2048
    found = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    found.setdefault("rope_type", found.pop("type", "default"))
    for name, older, otherwise in (
        ("rope_theta", theta, 10000.0),
        ("partial_rotary_factor", fraction, default),
    ):
        if found.get(name) is None:
            found[name] = otherwise if fields.get(older) is None else fields[older]
    found.setdefault("original_max_position_embeddings", longest)
    if found.get("factor") is None:
        found["factor"] = longest / found["original_max_position_embeddings"]
    return found


def scaling(found: Json) -> RotaryScaling | None:
    """How frequencies are stretched for longer texts."""
    kind, original = found["rope_type"], found["original_max_position_embeddings"]
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=float(found["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_max_length=original,
        )
    if kind == "yarn":
        given = {name: found[name] for name in YARN if found.get(name) is not None}
        # Whole numbers are often written without a point.
        given |= {name: float(value) for name, value in given.items() if name != "truncate"}
        return YarnScaling(factor=float(found["factor"]), original_max_length=original, **given)
    raise FolderError(
        f"config.json has rope_type={kind!r}; effscale has default, linear, llama3 and yarn"
    )


def fields_of(rotary: Rotary, head_dim: int) -> dict[str, Any]:
    """``rope_parameters``, and the greatest length that goes with them where they tell it."""
    dim = head_dim if rotary.dim is None else rotary.dim
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if dim != head_dim:
        # The product with head_dim is rounded down, so it must not fall short.
        fraction = dim / head_dim
        if int(head_dim * fraction) < dim:
            fraction = math.nextafter(fraction, 1.0)
        found["partial_rotary_factor"] = fraction
    match rotary.scaling:
        case LinearScaling(factor=factor):
            found |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaled:
            found |= {
                "rope_type": "llama3",
                "factor": scaled.factor,
                "low_freq_factor": scaled.low_freq_factor,
                "high_freq_factor": scaled.high_freq_factor,
                "original_max_position_embeddings": scaled.original_max_length,
            }
        case YarnScaling() as scaled:
            found |= {
                "rope_type": "yarn",
                "factor": scaled.factor,
                "original_max_position_embeddings": scaled.original_max_length,
            }
            found |= {n: getattr(scaled, n) for n in YARN if getattr(scaled, n) is not None}
    fields: dict[str, Any] = {"rope_parameters": found}
    if "original_max_position_embeddings" in found:
        original = found["original_max_position_embeddings"]
        longest = found["factor"] * original
        if found["rope_type"] == "llama3":
            # transformers wants it larger than the original one, even where the factor is 1.
            fields["max_position_embeddings"] = max(math.ceil(longest), original + 1)
        else:
            # Where it cannot be the product it should say nothing, as the same number does.
            fields["max_position_embeddings"] = int(longest) if longest % 1 == 0 else original
    return fields
