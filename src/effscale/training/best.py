"""The best model of a run by a figure of its evaluations, beside the checkpoints that the run goes on from."""

import math
import os
from typing import Any, NamedTuple

import numpy as np

from effscale.training.checkpoint import Checkpoints
from effscale.training.state import abstract


class Best(NamedTuple):
    """A model, the step after which it was evaluated, and the figure that made it the best, in float32."""

    model: Any
    step: int
    value: float


class KeepBest:
    """Keeps the model with the greatest value of a figure, such as the accuracy on held-out examples.

    It lies in a folder of its own as a checkpoint, whole and with checksums, so it outlives a kill; a run that goes on from an
    earlier step comes past the same values again and leaves it as it is. Of equal values the first counts.

    Args:
        folder: Where the model is kept; made when first needed.

    Example:
        >>> import tempfile
        >>> best = KeepBest(tempfile.mkdtemp())
        >>> for step, accuracy in ((10, 0.5), (20, 0.75), (30, 0.625)):
        ...     best.offer(step, {"w": np.full(2, step, np.float32)}, accuracy)
        >>> found = best.restore({"w": np.zeros(2, np.float32)})
        >>> found.step, found.value, found.model["w"].tolist()
        (20, 0.75, [20.0, 20.0])
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._checkpoints = Checkpoints(folder, keep=1, asynchronous=False)
        self._value: float | None = None

    def offer(self, step: int, model: Any, value: float) -> None:
        """Keep the model in place of the one kept so far if its value is greater; one that is not finite never is.

        Args:
            step: Batches consumed by the model.
            model: Any pytree; it may be donated as soon as this returns.
            value: What it is judged by.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._value is None:
            empty = self._checkpoints.is_empty
            self._value = -math.inf if empty else self.restore(model).value
        value = float(np.float32(value))  # as it comes back, so that it is equal to itself
        if math.isfinite(value) and value > self._value:
            self._checkpoints.save(step, _Kept(model, np.array(value, np.float32)), force=True)
            self._value = value

    def restore(self, abstract_model: Any) -> Best:
        """Return the best model so far.

        Args:
            abstract_model: A model of the wanted structure: arrays or ``jax.ShapeDtypeStruct``.

        Raises:
            FileNotFoundError: None has been kept.
            CheckpointError: It is damaged, or of another model.
        """
        wanted = _Kept(abstract(abstract_model), np.zeros((), np.float32))
        restored = self._checkpoints.restore(wanted)
        if restored is None:
            raise FileNotFoundError(f"{self._checkpoints.folder} holds no model")
        return Best(restored.state.model, restored.step, float(restored.state.value))


class _Kept(NamedTuple):
    model: Any
    value: Any
