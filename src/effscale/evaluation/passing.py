"""Programs that pass their tests."""

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    r"""The chance that at least one of k programs passes, estimated without bias from more of them: $1 - \binom{n - c}{k} / \binom{n}{k}$.

    Args:
        samples: Programs n that were drawn for a problem.
        passed: Those c of them that pass its tests.
        k: How many may be tried.

    Raises:
        ValueError: k is larger than ``samples``, or ``passed`` is.

    References:
        Chen et al., "Evaluating Large Language Models Trained on Code", 2021, section 2.1.

    Example:
        >>> round(pass_at_k(200, 31, 1), 3), round(pass_at_k(200, 31, 10), 3)
        (0.155, 0.822)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must be from 1 to samples={samples}")
    if not 0 <= passed <= samples:
        raise ValueError(f"passed={passed}: must be from 0 to samples={samples}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
