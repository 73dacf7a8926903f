"""Signs of an unstable run: increases of the loss, and large estimates of the gradient's variance in Adam.

The paper on sequence-length warmup finds that large variance estimates coincide with increases of the loss, and that long
sequences cause them early in training. You can log all of these in any run.
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

from effscale.training.metrics import MetricsWriter


def loss_ratio(losses: Shaped[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    r"""Return the ratio of each loss to the smallest earlier loss.

    $$\rho_t = \ell_t / \min_{i < t} \ell_i, \qquad \rho_0 = 1$$

    While the loss decreases the ratio is at most 1; a ratio above 1.2 is the usual sign of instability. The ratio of a loss that
    is not finite is not finite either, and such a loss is ignored in later minima.

    Args:
        losses: Positive training losses, step by step.

    Example:
        >>> loss_ratio(np.array([4.0, 2.0, 3.0, 1.0])).tolist()
        [1.0, 0.5, 1.5, 0.5]

    References:
        Li et al., "The Stability-Efficiency Dilemma" (2021), section 3. https://arxiv.org/abs/2108.06084
    """
    losses = np.asarray(losses, np.float64)
    finite = np.where(np.isfinite(losses), losses, np.nan)
    before = np.fmin.accumulate(np.concatenate([[np.nan], finite]))[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = losses / before
    return np.where(np.isnan(before) & np.isfinite(losses), 1.0, ratios)


def unstable_steps(losses: Shaped[np.ndarray, " steps"], threshold: float = 1.2) -> int:
    """Return the number of steps whose ``loss_ratio`` is above the threshold, or whose loss is not finite.

    >>> unstable_steps(np.array([4.0, 2.0, 3.0, 1.0, np.nan]))
    2
    """
    return int(np.sum(~(loss_ratio(losses) <= threshold)))  # NaN counts as unstable


def variance_metrics(opt_state: Any) -> dict[str, jax.Array]:
    r"""Return the norm and the maximum of Adam's variance state.

    With the second moment $v$ as ``optax.scale_by_adam`` holds it, without the correction of its bias, and
    sums and maximum over all parameters:

    $$\text{variance\_norm} = \sum_i \sqrt{v_i}, \qquad \text{variance\_max} = \max_i \sqrt{v_i}$$

    The norm is the $\ell_1$ norm of $\sqrt v$, in which single large values weigh less than in other norms. They
    are what Megatron-DeepSpeed logs as ``variance_sqrt_l1`` and ``variance_sqrt_abs_max``.

    Args:
        opt_state: The state of an optimizer with ``optax.ScaleByAdamState`` anywhere in it: in chains, masks,
            ``optax.MultiSteps`` and so on. If there are several, all count. (``optax.adamax`` and ``optax.nadam`` also use this
            type, but that of Adamax is not a variance.)

    Returns:
        ``variance_norm`` and ``variance_max``, float32 scalars. Log them with ``with_metrics``.

    Raises:
        ValueError: The state contains no Adam.

    Example:
        >>> state = optax.adam(1e-3).init({"w": jnp.ones(3)})
        >>> {name: float(value) for name, value in variance_metrics(state).items()}
        {'variance_norm': 0.0, 'variance_max': 0.0}

    References:
        Li et al., "The Stability-Efficiency Dilemma" (2021), section 3. https://arxiv.org/abs/2108.06084
    """
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    moments = jax.tree.leaves([state.nu for state in states])
    if not moments:
        raise ValueError(
            "the optimizer's state contains no optax.ScaleByAdamState with parameters. "
            "Only Adam and optimizers built on optax.scale_by_adam have a variance."
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
    """Return a training step that reports additional metrics.

    Args:
        step: ``step(state, batch) -> (state, metrics)``, not jitted; keyword arguments (``frozen``) are passed on to it.
        function: A function from the new state to additional metrics; it is traced together with the step.

    Returns:
        The step. Tracing it raises a ValueError if both report the same name.

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
                f"the step already reports {', '.join(sorted(taken))}. Rename the metrics of the function."
            )
        return state, {**metrics, **more}

    return reporting


class LossRatioWriter:
    """A writer that adds ``loss_ratio`` to each record with a ``loss`` and passes all records to another writer.

    It compares each loss with those written before: with ``fit(log_every=1)``, the losses of all steps. If evaluations are
    written to it too, their loss must have a different name, such as ``val_loss``.

    Args:
        writer: The writer of the records.
        records: For a resumed run, the records up to the step where it resumes, such as ``read_jsonl(path)`` after
            ``JsonlWriter(path, resume_step=...)`` has removed the later ones. The ratios are then those of an
            uninterrupted run.

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
            # JSON has no NaN, so such a loss was written as null.
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
        """Add the ratio if there is a loss, and pass the record on."""
        if "loss" in values:
            values = {**values, "loss_ratio": self._see(values["loss"])}
        self._writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush the writer."""
        self._writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()
