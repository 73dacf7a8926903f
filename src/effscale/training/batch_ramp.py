"""Batches that grow: the ramp of GPT-3 and BLOOM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.training.stages import Stages


def batch_ramp(start: int, increment: int, samples: int, final: int) -> Stages[int]:
    r"""The batch size at each step, when it grows from ``start`` to ``final`` over the first ``samples`` rows.

    With $n = (\text{final} - \text{start}) / \text{increment}$ and $c$ rows consumed before a step, the step takes
    $\text{start} + \text{increment} \lfloor c / (\text{samples} / n) \rfloor$ rows, and ``final`` from ``samples`` rows on. It is what
    Megatron-DeepSpeed calls ``--rampup-batch-size START INCREMENT SAMPLES``. Learning rates should then be scheduled by tokens or
    samples (``ScheduleConfig(unit="tokens")``), as BLOOM's are.

    Args:
        start: Rows of the first batch.
        increment: By how many rows it grows each time.
        samples: Rows over which it grows; 0 begins with ``final``.
        final: Rows of the last batch.

    Returns:
        The stages; each size is one more shape to compile. ``total`` and ``steps_until`` with ``cost=lambda rows: rows`` count rows.

    Raises:
        ValueError: A number is out of range, or ``increment`` does not lead from ``start`` to ``final``.

    References:
        Le Scao et al., "BLOOM", 2022, table 3: 192 + 16 over 9,765,625 rows up to 2,048.

    >>> bloom = batch_ramp(192, 16, 9_765_625, 2048)
    >>> bloom(0), len(bloom.values), bloom.starts[1], bloom(10**9)
    (192, 117, 439, 2048)
    """
    if min(start, increment, final) < 1 or samples < 0:
        raise ValueError(
            f"batch_ramp({start}, {increment}, {samples}, {final}): sizes must be at least 1, and samples at least 0"
        )
    if final < start or (final - start) % increment:
        raise ValueError(
            f"increment={increment} does not lead from start={start} to final={final}: it must divide their difference, {final - start}"
        )
    times = (final - start) // increment
    if not times or not samples:
        return Stages((0,), (final,))
    starts, sizes, step, consumed = [0], [start], 0, 0
    for number in range(1, times + 1):
        # The first step before which number/times of the samples are behind.
        missing = -(-samples * number // times) - consumed
        steps = max(-(-missing // sizes[-1]), 0)
        if steps == 0:  # the batch was larger than a stage
            sizes[-1] = start + increment * number
            continue
        step, consumed = step + steps, consumed + steps * sizes[-1]
        starts.append(step)
        sizes.append(start + increment * number)
    return Stages(tuple(starts), tuple(sizes))


def resize_rows(batch: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
    """A batch of so many rows, for ``StagedStep(shape_batch=resize_rows)``: the batch itself if it has them, or else one of that shape.

    The rows that are added are there for their shape, from which steps to come are compiled.

    >>> resize_rows({"input_ids": np.zeros((2, 8))}, 4)["input_ids"].shape
    (4, 8)
    """
    resize = lambda x: x if len(x) == rows else np.resize(x, (rows, *x.shape[1:]))
    return {name: resize(array) for name, array in batch.items()}
