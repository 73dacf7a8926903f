"""A training step with a schedule of shapes, and the shape of a batch that such schedules change."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from effscale.training.buckets import Compilation, ShapeBuckets
from effscale.training.stages import Stages
from effscale.training.state import abstract


class Changes(NamedTuple):
    """What changes on the way of a run: a curriculum, random-LTD, a teacher that leaves.

    Attributes:
        stages: The value of each stage of the run.
        shape_batch: ``shape_batch(batch, value) -> batch`` gives a batch its shape in a stage, on the host.
    """

    stages: Stages[Any]
    shape_batch: Callable[[Any, Any], Any]


class StagedStep:
    """A training step whose batches change shape in each stage of a schedule.

    Batches are shaped on the host, with one executable per shape. After the first step, all later shapes are compiled in a
    background thread in the order in which they are needed. So no later step waits for a compilation, unless its stage begins
    before its compilation has finished.

    Args:
        step: The result of ``make_train_step``, not jitted.
        stages: The schedule.
        shape_batch: ``shape_batch(batch, value) -> batch``, which gives the batch the shape for this value of the schedule.
        place_batch: The same function as passed to ``fit``; it also places the later shapes for compilation.
        donate_argnums: As in ``jax.jit``; the state is donated by default.

    Example:
        Rows grow from 4 to 8 tokens after two steps.

        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from effscale.training import Stages, StagedStep
        >>> def step(state, batch):
        ...     return state + batch["input_ids"].sum(), {"length": batch["input_ids"].shape[1]}
        >>> staged = StagedStep(
        ...     step, Stages((0, 2), (4, 8)), lambda batch, length: {"input_ids": batch["input_ids"][:, :length]})
        >>> state, batch = jnp.float32(0), {"input_ids": np.ones((2, 8), np.float32)}
        >>> for number in range(3):  # what fit does
        ...     state, metrics = staged(state, staged.before_step(number, batch))
        >>> float(state), staged.num_compilations
        (32.0, 2)
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        stages: Stages[Any],
        shape_batch: Callable[[Any, Any], Any],
        *,
        place_batch: Callable[[Any], Any] | None = None,
        donate_argnums: int | tuple[int, ...] = 0,
    ):
        self.stages = stages
        self._shape_batch, self._place_batch = shape_batch, place_batch
        self._buckets = ShapeBuckets(step, donate_argnums=donate_argnums)
        self._coming: tuple[int, Any] | None = None
        self._prepared = False

    def before_step(self, step: int, batch: Any) -> Any:
        """Give the batch the shape of the step; for ``fit(before_step=...)``."""
        if not self._prepared:
            self._coming = step, batch
        return self._shape_batch(batch, self.stages(step))

    def __call__(self, state: Any, batch: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run the step; for ``fit(step_fn=...)``. Keyword arguments (``frozen``) must be the same in every stage."""
        out = self._buckets(state, batch, **kwargs)
        if not self._prepared and self._coming is not None:
            self._prepare(out[0], *self._coming, kwargs)
            self._prepared, self._coming = True, None
        return out

    @property
    def compilations(self) -> list[Compilation]:
        """The compilations so far."""
        return self._buckets.compilations

    @property
    def num_compilations(self) -> int:
        """The number of executables compiled so far; in the end one per distinct shape."""
        return self._buckets.num_compilations

    def wait(self) -> None:
        """Wait until all shapes are compiled."""
        self._buckets.wait()

    def close(self) -> None:
        """Cancel compilations that have not started, and wait for the others. Python also does this when it exits."""
        self._buckets.close()

    def _prepare(self, state: Any, step: int, batch: Any, kwargs: dict[str, Any]) -> None:
        described = abstract(state)
        for value in self.stages.values[self.stages.index(step) + 1 :]:
            shaped = self._shape_batch(batch, value)
            placed = shaped if self._place_batch is None else self._place_batch(shaped)
            self._buckets.prepare(described, abstract(placed), **kwargs)


def token_shape(batch: Mapping[str, Any], field: str) -> tuple[int, int]:
    """Return the shape ``(rows, seq)`` of a batch's tokens.

    Args:
        batch: A mapping of arrays by name.
        field: The name of the tokens.

    Raises:
        ValueError: The array is missing or does not have two dimensions.
    """
    shape = getattr(batch.get(field), "shape", ())
    if len(shape) != 2:
        arrays = {name: getattr(x, "shape", None) for name, x in batch.items()}
        found = ", ".join(f"{name} {shape}" for name, shape in arrays.items() if shape is not None)
        raise ValueError(
            f"a batch must have {field} of shape (rows, seq), got {found or 'no arrays'}. If the tokens have a different name, "
            'pass it as field="..."'
        )
    return shape
