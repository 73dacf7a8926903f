"""Warn when a router sends most tokens to few experts."""

import math
import warnings
from collections.abc import Sequence

from effscale.training.metrics import MetricsWriter, Values, plain


def effective_experts(load: Sequence[float]) -> float:
    r"""Return the number of evenly loaded experts that a load is equivalent to: $e^{H}$, with its entropy $H$.

    This is the number of all experts if the load is even, and 1 if a single expert gets everything.

    Args:
        load: The share of choices of each expert.

    Example:
        >>> round(effective_experts([0.25, 0.25, 0.25, 0.25]), 6), effective_experts([1.0, 0.0, 0.0, 0.0])
        (4.0, 1.0)
    """
    total = sum(load)
    shares = [share / total for share in load if share > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


class RouterWatch:
    """A writer that warns when a metric ``load`` shows that a router has collapsed, and passes all records to another writer.

    ``load`` is a mean over layers (with the same number of experts), so it can hide a single collapsed layer among many.

    Args:
        writer: The writer of the records.
        least: The minimum number of effective experts, as a share of all experts from 0 to 1.
        patience: The number of consecutive records below it before the warning, as a router is uneven at the start.

    Example:
        >>> import warnings
        >>> from effscale.training import MultiWriter
        >>> writer = RouterWatch(MultiWriter([]), patience=1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     writer.write(100, {"load": [0.97, 0.01, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0]})
        >>> str(caught[0].message).split(":")[0]
        'step 100, load'
    """

    def __init__(self, writer: MetricsWriter, *, least: float = 0.25, patience: int = 20):
        self._writer, self._least, self._patience = writer, least, patience
        self._in_row: dict[str, int] = {}

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Check the loads, and pass the record on."""
        for name, load in plain(values).items():
            if name.split("/")[0] == "load" and isinstance(load, list) and sum(load) > 0:
                self._look(step, name, load)
        self._writer.write(step, values, timing)

    def _look(self, step: int, name: str, load: list[float]) -> None:
        worth = effective_experts(load)
        row = self._in_row.get(name, 0) + 1 if worth < self._least * len(load) else 0
        self._in_row[name] = row
        if row == self._patience:
            first = max(range(len(load)), key=lambda expert: load[expert])
            warnings.warn(
                f"step {step}, {name}: the router has collapsed. Its load is equivalent to {worth:.1f} of {len(load)} experts for {row} records, and "
                f"expert {first} gets {100 * load[first]:.0f}% of the choices. Use a larger RouterConfig.balance, a z_loss of 1e-3 or a lower "
                "learning rate.",
                stacklevel=3,
            )

    def flush(self) -> None:
        """Flush the other writer."""
        self._writer.flush()

    def close(self) -> None:
        """Close the other writer."""
        self._writer.close()
