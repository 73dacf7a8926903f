"""Keep the best model of a run by an evaluation metric, separately from the checkpoints the run resumes from."""

import math
import os
from typing import Any, NamedTuple

import numpy as np

from effscale.training.checkpoint import Checkpoints
from effscale.training.state import abstract


class Best(NamedTuple):
    """A model, the step after which it was evaluated, and its metric in float32."""

    model: Any
    step: int
    value: float


class KeepBest:
    """Keep the model with the greatest value of a metric, such as the accuracy on held-out examples.

    The model is stored in a separate folder as a complete checkpoint with checksums, so it survives a killed run. A run that
    resumes from an earlier step reaches the same values again and does not overwrite it. Of equal values, the first is kept.

    Args:
        folder: The folder for the model; it is created when first needed.

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
        """Keep the model if its value is greater than that of the model kept so far. Values that are not finite are ignored.

        Args:
            step: The number of batches the model has consumed.
            model: Any pytree; it may be donated as soon as this returns.
            value: The metric.

        Raises:
            CheckpointError: The model could not be written.
        """
        if self._value is None:
            empty = self._checkpoints.is_empty
            self._value = -math.inf if empty else self.restore(model).value
        value = float(
            np.float32(value)
        )  # rounded as when read back, so that equal values compare equal
        if math.isfinite(value) and value > self._value:
            self._checkpoints.save(step, _Kept(model, np.array(value, np.float32)), force=True)
            self._value = value

    def restore(self, abstract_model: Any) -> Best:
        """Return the best model kept so far.

        Args:
            abstract_model: A model with the expected structure, of arrays or ``jax.ShapeDtypeStruct``.

        Raises:
            FileNotFoundError: No model has been kept.
            CheckpointError: The checkpoint is damaged or belongs to a different model.
        """
        wanted = _Kept(abstract(abstract_model), np.zeros((), np.float32))
        restored = self._checkpoints.restore(wanted)
        if restored is None:
            raise FileNotFoundError(f"{self._checkpoints.folder}: no model has been kept")
        return Best(restored.state.model, restored.step, float(restored.state.value))


class _Kept(NamedTuple):
    model: Any
    value: Any
