"""Batch-size ramp, as used for GPT-3 and BLOOM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.training.stages import Stages


def batch_ramp(start: int, increment: int, samples: int, final: int) -> Stages[int]:
    r"""Return the batch size at each step of a ramp from ``start`` to ``final`` over the first ``samples`` rows.

    With $n = (\text{final} - \text{start}) / \text{increment}$ and $c$ rows consumed before a step, the step takes
    $\text{start} + \text{increment} \lfloor c / (\text{samples} / n) \rfloor$ rows, and ``final`` from ``samples`` rows on. It is what
    Megatron-DeepSpeed calls ``--rampup-batch-size START INCREMENT SAMPLES``. Learning rates should then be scheduled by tokens or
    samples (``ScheduleConfig(unit="tokens")``), as BLOOM's are.

    Args:
        start: The number of rows in the first batch.
        increment: The number of rows by which it grows each time.
        samples: The number of rows over which it grows; 0 starts with ``final``.
        final: The number of rows in the last batch.

    Returns:
        The stages; each size is one more shape to compile. To count rows, call ``total`` and ``steps_until`` with
        ``cost=lambda rows: rows``.

    Raises:
        ValueError: A number is out of range, or ``increment`` does not divide ``final - start``.

    References:
        Le Scao et al., "BLOOM" (2022), table 3: 192 + 16 over 9,765,625 rows up to 2,048. https://arxiv.org/abs/2211.05100

    >>> bloom = batch_ramp(192, 16, 9_765_625, 2048)
    >>> bloom(0), len(bloom.values), bloom.starts[1], bloom(10**9)
    (192, 117, 439, 2048)
    """
    if min(start, increment, final) < 1 or samples < 0:
        raise ValueError(
            f"start, increment and final must be at least 1 and samples at least 0, got batch_ramp({start}, {increment}, {samples}, {final})"
        )
    if final < start or (final - start) % increment:
        raise ValueError(
            f"increment must divide the difference from start={start} to final={final}, {final - start}, got {increment}"
        )
    times = (final - start) // increment
    if not times or not samples:
        return Stages((0,), (final,))
    starts, sizes, step, consumed = [0], [start], 0, 0
    for number in range(1, times + 1):
        # The first step before which number/times of the samples are consumed.
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
    """Return a batch with ``rows`` rows, for ``StagedStep(shape_batch=resize_rows)``.

    A batch that already has that many rows is returned as it is. Otherwise the result only has the right shape, for compiling
    later steps in advance; its content is meaningless.

    >>> resize_rows({"input_ids": np.zeros((2, 8))}, 4)["input_ids"].shape
    (4, 8)
    """
    resize = lambda x: x if len(x) == rows else np.resize(x, (rows, *x.shape[1:]))
    return {name: resize(array) for name, array in batch.items()}
