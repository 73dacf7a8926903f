"""The workers that an optimizer averages over, and how they do it."""

import dataclasses
from typing import Any, get_args

import jax

from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.workers import bound_axis_size, differs, has_types


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers that a 1-bit optimizer averages over, and how it compresses their mean.

    Attributes:
        axis_name: The mesh axis along which the workers lie. The update is called within `effscale.parallel.per_worker`. An
            axis of one worker sends and compresses nothing.
        num_workers: Only where no mesh gives it (`effscale.parallel.simulate_workers`).
        scales: One scale per ``tensor``, or one for the whole ``tree``. None takes the optimizer's own choice: 1-bit LAMB has
            one for the tree, as in its paper, the others have one per tensor.
        specs: How the parameters are divided over the other mesh axes; see `effscale.parallel.compressed_mean`.

    Raises:
        ValueError: ``axis_name`` is not the name of one axis, or ``scales`` is unknown.

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
                f"scales={self.scales!r} is unknown; one of {', '.join(get_args(Scales))}"
            )


def axis_of(workers: Workers | None) -> str | None:
    """Return the workers' axis; None for one worker.

    Raises:
        ValueError: This is something else, such as the name of the axis.
    """
    if workers is not None and not isinstance(workers, Workers):
        raise ValueError(f"workers={workers!r}: give the object, workers=Workers({workers!r})")
    return None if workers is None else workers.axis_name


def with_scales(workers: Workers | None, scales: Scales) -> Workers | None:
    """Return the workers, with these scales where they were not chosen."""
    if workers is None or workers.scales is not None:
        return workers
    return dataclasses.replace(workers, scales=scales)


def check_axis(axis_name: Any) -> None:
    """Raise a ``ValueError`` unless this is the name of one axis."""
    if not isinstance(axis_name, str):
        raise ValueError(
            f"axis_name={axis_name!r} must be the name of one mesh axis. The compiler averages over all other axes, in full; "
            "to compress over several, give the mesh one axis of their product"
        )


def check_local(gradients: Any, axis_name: str | None) -> None:
    """Raise if gradients are known to be the same on all workers, or if the axis is not bound."""
    if axis_name is None:
        return
    if bound_axis_size(axis_name) is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: take the step within per_worker(step, {axis_name!r}), or leave "
            "the workers out to train on one"
        )
    leaves = jax.tree.leaves(gradients)
    if leaves and has_types(axis_name) and not any(differs(g, axis_name) for g in leaves):
        raise ValueError(
            f"the gradients are the same on all workers along {axis_name!r}, so they were summed already and there is "
            "nothing to compress: differentiate at worker_params(params, opt_state), and do not average yourself. (Instead "
            "of optax.MultiSteps use make_train_step(accumulate=).)"
        )
