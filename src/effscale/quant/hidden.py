"""Looking into a model's layers while it reads a batch."""

from collections.abc import Mapping
from typing import Any

from effscale.models import Transformer

GIVEN = ("attention_mask", "positions", "segment_ids", "type_ids")


def captured(model: Transformer, batch: Mapping[str, Any], **options: Any) -> tuple[Any, ...]:
    """What ``model.encode(..., capture=...)`` captures for a batch with ``input_ids`` and any of `GIVEN`."""
    given = {name: batch[name] for name in GIVEN if name in batch}
    return model.encode(batch["input_ids"], **given, **options).captured
