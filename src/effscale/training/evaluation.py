"""Evaluation: exact means over all batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from effscale.training.loss import Loss
from effscale.training.step import LossFunction, frozen_argument


def make_eval_step(loss_fn: LossFunction) -> Callable[..., Loss]:
    """Return ``eval_step(model, batch, *, frozen=None) -> Loss``, which computes the sums of a batch.

    The loss function gets ``key=None`` (no dropout), and ``frozen`` as its fourth argument if it is given.
    """

    def eval_step(model: Any, batch: Any, *, frozen: Any = None) -> Loss:
        return loss_fn(model, batch, None, *frozen_argument(frozen)).in_float32()

    return eval_step


def evaluate(
    model: Any,
    eval_step: Callable[..., Loss],
    batches: Iterable[Any],
    *,
    frozen: Any = None,
    place_batch: Callable[[Any], Any] | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Return the mean loss and metrics over all batches, weighted by the weight of each batch.

    Args:
        model: The module.
        eval_step: The result of ``make_eval_step``, jitted.
        batches: Host batches; the last one may be smaller, or padded with rows of weight zero.
        frozen: What the loss reads without training it, such as a teacher, already on the devices.
        place_batch: Moves a host batch to the devices.
        prefix: A prefix for each name, such as ``val_``.

    Returns:
        ``loss``, ``weight`` and the means of ``Loss.metrics``, as Python floats; a metric that is an array becomes a
        (nested) list of them.

    Raises:
        ValueError: There were no batches, or the batches had no weight.
    """
    sums: dict[str, Any] = {}
    pending: list[Loss] = []
    given = {} if frozen is None else {"frozen": frozen}

    def add_up() -> None:
        # Sum in Python floats and float64, as float32 would lose the small addends of a long evaluation.
        for loss in jax.device_get(pending):
            for name, value in {"loss": loss.total, "weight": loss.weight, **loss.metrics}.items():
                wide = np.asarray(value, np.float64) if np.ndim(value) else float(value)
                sums[name] = sums.get(name, 0.0) + wide
        pending.clear()

    for batch in batches:
        pending.append(eval_step(model, place_batch(batch) if place_batch else batch, **given))
        if len(pending) == 16:  # fetch rarely enough to keep the device busy
            add_up()
    add_up()
    if not sums.get("weight"):
        raise ValueError(
            "evaluation saw no batch with weight; the dataset may be smaller than one batch"
        )
    weight = sums.pop("weight")
    return {prefix + "weight": weight} | {
        prefix + name: np.asarray(value / weight).tolist() for name, value in sums.items()
    }
