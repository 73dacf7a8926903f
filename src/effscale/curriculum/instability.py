"""Signs of an unstable run: how far the loss rose, and how large Adam's estimate of the gradient's variance is.

The paper on sequence-length warmup finds that large values of the latter come with rises of the former, and that long
sequences cause them early in training. All of these can be logged for any run.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from effscale.training import MetricsWriter


def loss_ratio(losses: Shaped[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    r"""Each loss over the smallest one before it.

    $$\rho_t = \ell_t / \min_{i < t} \ell_i, \qquad \rho_0 = 1$$

    A loss that falls keeps it at 1 or less; more than 1.2 is the usual sign of instability. A loss that is not finite
    has a ratio that is not, and counts in no minimum.

    Args:
        losses: Positive training losses, step by step.

    Example:
        >>> loss_ratio(np.array([4.0, 2.0, 3.0, 1.0])).tolist()
        [1.0, 0.5, 1.5, 0.5]

    Source: Li et al., "The Stability-Efficiency Dilemma", 2021, section 3.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.where(np.isfinite(losses), losses, np.nan)
    before = np.fmin.accumulate(np.concatenate([[np.nan], finite]))[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = losses / before
    return np.where(np.isnan(before) & np.isfinite(losses), 1.0, ratios)


def unstable_steps(losses: Shaped[np.ndarray, " steps"], threshold: float = 1.2) -> int:
    """The number of steps whose ``loss_ratio`` is above the threshold, or whose loss is not finite.

    >>> unstable_steps(np.array([4.0, 2.0, 3.0, 1.0, np.nan]))
    2
    """
    return int(np.sum(~(loss_ratio(losses) <= threshold)))  # NaN is no less


def variance_metrics(opt_state: Any) -> dict[str, jax.Array]:
    r"""Norm and maximum of Adam's variance state.

    With the second moment $v$ as ``optax.scale_by_adam`` holds it, without the correction of its bias, and
    sums and maximum over all parameters:

    $$\text{variance\_norm} = \sum_i \sqrt{v_i}, \qquad \text{variance\_max} = \max_i \sqrt{v_i}$$

    The norm is the $\ell_1$ norm of $\sqrt v$, in which single large values weigh less than in others. They
    are what Megatron-DeepSpeed logs as ``variance_sqrt_l1`` and ``variance_sqrt_abs_max``.

    Args:
        opt_state: The state of an optimizer, with ``optax.ScaleByAdamState`` anywhere in it: in chains, masks,
            ``optax.MultiSteps`` and so on. Of several, all count. (``optax.adamax`` and ``optax.nadam`` keep theirs in that
            type, too, and Adamax's is no variance.)

    Returns:
        ``variance_norm`` and ``variance_max``, float32 scalars. Give it to ``with_metrics``.

    Raises:
        ValueError: There is no Adam in it.

    Example:
        >>> state = optax.adam(1e-3).init({"w": jnp.ones(3)})
        >>> {name: float(value) for name, value in variance_metrics(state).items()}
        {'variance_norm': 0.0, 'variance_max': 0.0}

    Source: Li et al., "The Stability-Efficiency Dilemma", 2021, section 3.
    """
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    moments = jax.tree.leaves([state.nu for state in states])
    if not moments:
        raise ValueError(
            "the optimizer's state holds no optax.ScaleByAdamState with parameters; "
            "only Adam and what is built on optax.scale_by_adam has a variance"
        )
    roots = [jnp.sqrt(v.astype(jnp.float32)) for v in moments]
    return {
        "variance_norm": sum((root.sum() for root in roots), jnp.float32(0)),
        "variance_max": functools.reduce(jnp.maximum, (root.max() for root in roots)),
    }


def with_metrics(
    step: Callable[..., tuple[Any, Mapping[str, Any]]],
    function: Callable[[Any], Mapping[str, Any]],
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A training step that reports more.

    Args:
        step: ``step(state, batch) -> (state, metrics)``, not jitted; keyword arguments (``frozen``) are passed on to it.
        function: From the new state to further metrics; it is traced together with the step.

    Returns:
        The step. It raises a ValueError while it is traced if both report the same name.

    Example:
        >>> from effscale.training import make_train_step, next_token_loss
        >>> step = make_train_step(next_token_loss, optax.adam(1e-3))
        >>> step = with_metrics(step, lambda state: variance_metrics(state.opt_state))
    """

    @functools.wraps(step)
    def reporting(state: Any, batch: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = step(state, batch, **kwargs)
        more = function(state)
        if taken := metrics.keys() & more.keys():
            raise ValueError(
                f"the step reports {', '.join(sorted(taken))} already; rename the function's"
            )
        return state, {**metrics, **more}

    return reporting


class LossRatioWriter:
    """A writer that adds ``loss_ratio`` to each record with a ``loss``, and gives all to another writer.

    It compares with the losses that were written: with ``fit(log_every=1)``, those of all steps. An evaluation that is
    written to it, too, must call its own otherwise, such as ``val_loss``.

    Args:
        writer: Where the records go.
        records: Of a resumed run, the records up to where it goes on, such as ``read_jsonl(path)`` once
            ``JsonlWriter(path, resume_step=...)`` has cut off the later ones. The ratios are then those of a run that
            never stopped.

    Example:
        >>> import tempfile
        >>> from effscale.training import JsonlWriter, read_jsonl
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> writer = LossRatioWriter(JsonlWriter(path))
        >>> for step, loss in enumerate([4.0, 2.0, 3.0], 1):
        ...     writer.write(step, {"loss": loss})
        >>> writer.close()
        >>> [record["loss_ratio"] for record in read_jsonl(path)]
        [1.0, 0.5, 1.5]
    """

    def __init__(self, writer: MetricsWriter, records: Iterable[Mapping[str, Any]] = ()):
        self._writer, self._smallest = writer, math.nan
        for record in records:
            # JSON has no NaN: such a loss was written as null.
            if record.get("loss") is not None:
                self._see(record["loss"])

    def _see(self, loss: float) -> float:
        ratio = loss_ratio(np.array([self._smallest, loss]))[1]
        if math.isfinite(loss):
            self._smallest = float(np.fmin(self._smallest, loss))
        return float(ratio)

    def write(
        self, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None
    ) -> None:
        """Add the ratio if there is a loss, and hand on."""
        if "loss" in values:
            values = {**values, "loss_ratio": self._see(values["loss"])}
        self._writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush the writer."""
        self._writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()
