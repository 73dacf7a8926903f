"""Evaluation as a true mean over everything seen."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from effscale.training.loss import Loss
from effscale.training.step import LossFunction


def make_eval_step(loss_fn: LossFunction) -> Callable[[Any, Any], Loss]:
    """``eval_step(model, batch) -> Loss``: the sums of a batch, with ``key=None`` given to the loss (no dropout)."""

    def eval_step(model: Any, batch: Any) -> Loss:
        return loss_fn(model, batch, None).in_float32()

    return eval_step


def evaluate(
    model: Any,
    eval_step: Callable[[Any, Any], Loss],
    batches: Iterable[Any],
    *,
    place_batch: Callable[[Any], Any] | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """Mean loss and metrics over all batches, weighted by what each batch holds.

    Args:
        model: The module.
        eval_step: From ``make_eval_step``, jitted.
        batches: Host batches; the last one may be smaller, or padded with rows of zero weight.
        place_batch: Puts a host batch on the devices.
        prefix: Put before each name, as in ``val_``.

    Returns:
        ``loss``, ``weight`` and the means of ``Loss.metrics``, as Python floats.

    Raises:
        ValueError: There was no batch, or the batches had no weight.
    """
    sums: dict[str, float] = {}
    pending: list[Loss] = []

    def add_up() -> None:
        # In Python floats: float32 sums would lose the small addends of a long evaluation.
        for loss in jax.device_get(pending):
            for name, value in {"loss": loss.total, "weight": loss.weight, **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        pending.clear()

    for batch in batches:
        pending.append(eval_step(model, place_batch(batch) if place_batch else batch))
        if len(pending) == 16:  # the device is kept busy while few results wait
            add_up()
    add_up()
    if not sums.get("weight"):
        raise ValueError(
            "evaluation saw no batch with weight; the data set may be smaller than one batch"
        )
    weight = sums.pop("weight")
    return {prefix + "weight": weight} | {
        prefix + name: value / weight for name, value in sums.items()
    }
