"""The workers that an optimizer averages over."""

import dataclasses
from typing import Any, get_args

import jax
import optax

from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.worker_steps import tracing_axis
from effscale.parallel.workers import bound_axis_size, differs, has_types


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers that a 1-bit optimizer averages over, and how it compresses their mean.

    Attributes:
        axis_name: The mesh axis of the workers. Call the update within ``effscale.parallel.per_worker``. With an
            axis of one worker nothing is sent or compressed.
        num_workers: The number of workers. Required if no mesh defines the axis (``effscale.parallel.simulate_workers``).
        scales: One scale per ``tensor``, or one for the whole ``tree``. None uses the default of the optimizer: 1-bit LAMB has
            one for the tree, as in its paper, the others have one per tensor.
        specs: How the parameters are divided over the other mesh axes; see ``effscale.parallel.compressed_mean``.

    Raises:
        ValueError: ``axis_name`` is not the name of a single axis, or ``scales`` is unknown.

    Example:
        >>> from effscale.optim import onebit_adam
        >>> optimizer = onebit_adam(1e-3, freeze_step=1000, workers=Workers("data"))
    """

    axis_name: str
    _: dataclasses.KW_ONLY
    num_workers: int | None = None
    scales: Scales | None = None
    specs: Any = None

    def __post_init__(self):
        check_axis(self.axis_name)
        if self.scales is not None and self.scales not in get_args(Scales):
            raise ValueError(
                f"scales must be one of {', '.join(get_args(Scales))}, got {self.scales!r}"
            )


def axis_of(workers: Workers | None) -> str | None:
    """Return the workers' axis; None for one worker.

    Raises:
        ValueError: ``workers`` is not a `Workers`, for instance the name of the axis.
    """
    if workers is not None and not isinstance(workers, Workers):
        axis = workers if isinstance(workers, str) else "data"
        raise ValueError(
            f"workers must be a Workers or None, got {workers!r}. Use workers=Workers({axis!r})."
        )
    return None if workers is None else workers.axis_name


def with_scales(workers: Workers | None, scales: Scales) -> Workers | None:
    """Return the workers, with these scales if they were not set."""
    if workers is None or workers.scales is not None:
        return workers
    return dataclasses.replace(workers, scales=scales)


def check_axis(axis_name: Any) -> None:
    """Raise a ``ValueError`` unless this is the name of a single axis."""
    if not isinstance(axis_name, str):
        raise ValueError(
            f"axis_name must be the name of one mesh axis, got {axis_name!r}. The compiler averages over all other axes, uncompressed; "
            "to compress over several axes, combine them into one mesh axis."
        )


def refusing_left_out_workers(
    optimizer: optax.GradientTransformationExtraArgs, workers: Workers | None
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer without workers raise an error in a step of ``per_worker``, where it would compress nothing.

    The transformations that it is made of do not: a step may average in another way first.
    """
    if workers is not None:
        return optimizer

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if (axis_name := tracing_axis()) is not None:
            raise ValueError(
                f"workers must be set in a step on the workers along {axis_name!r}, got None, with which nothing is compressed. "
                f"Use workers=Workers({axis_name!r})."
            )
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def check_local(gradients: Any, axis_name: str | None) -> None:
    """Raise an error if gradients are known to be the same on all workers, or if the axis is not bound."""
    if axis_name is None:
        return
    if bound_axis_size(axis_name) is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here. Wrap the training step in per_worker(step, {axis_name!r}), or "
            "create the optimizer without workers= to train on one."
        )
    leaves = jax.tree.leaves(gradients)
    if leaves and has_types(axis_name) and not any(differs(g, axis_name) for g in leaves):
        raise ValueError(
            f"the gradients are the same on all workers along {axis_name!r}, so they were already summed and there is "
            "nothing to compress. Differentiate at worker_params(params, opt_state), and do not average yourself. (Instead "
            "of optax.MultiSteps use make_train_step(accumulate=).)"
        )
