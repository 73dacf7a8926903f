"""Evaluation: exact means over all batches."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from effscale.options import Options, PositiveInt
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Options):
    """Evaluation on held-out batches: on the first few during training, and on all of them at the end.

    Attributes:
        data: The batches: an iterable, read from its start each time, or a function without arguments that returns one.
        loss: The loss function; it gets ``key=None``.
        every: Steps between evaluations; None evaluates only at the end.
        batches: The number of batches that the evaluations before the last one read; None reads all. Their loss is then
            named ``part_val_loss``, so that it is not mistaken for the loss on all batches, ``val_loss``.
        metrics: Names of metrics of ``loss`` to report as well, such as ``("accuracy",)``, with the same prefix.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.training import Evaluation, Loss
        >>> square = lambda model, batch, key: Loss(jnp.sum((model - batch) ** 2), jnp.float32(batch.size))
        >>> held_out = Evaluation(data=[np.ones(2, np.float32), np.zeros(2, np.float32)], loss=square, batches=1)
        >>> held_out(jnp.ones(())), held_out(jnp.ones(()), last=True)
        ({'part_val_loss': 0.0}, {'part_val_loss': 0.0, 'val_loss': 0.5})
    """

    data: Iterable[Any] | Callable[[], Iterable[Any]]
    loss: LossFunction
    every: PositiveInt | None = None
    batches: PositiveInt | None = None
    metrics: tuple[str, ...] = ()

    def __call__(
        self,
        model: Any,
        *,
        last: bool = False,
        place_batch: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Return the losses of a model.

        Args:
            model: The model.
            last: Whether training has ended, so that all batches are read.
            place_batch: Moves a host batch to the devices.
        """

        def means(prefix: str, batches: int | None) -> dict[str, Any]:
            rows = self.data() if callable(self.data) else self.data
            found = evaluate(
                model, self._step, itertools.islice(rows, batches), place_batch=place_batch
            )
            # A loss with auxiliary terms, such as those of routers, reports the loss of the task as a metric.
            found["loss"] = found.get("task_loss", found["loss"])
            return {prefix + name: found[name] for name in ("loss", *self.metrics)}

        values = {} if self.batches is None else means("part_val_", self.batches)
        return values | means("val_", None) if last or self.batches is None else values

    @functools.cached_property
    def _step(self) -> Callable[..., Loss]:
        return jax.jit(make_eval_step(self.loss))
