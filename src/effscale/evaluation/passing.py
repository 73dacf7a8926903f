"""The pass@k metric: programs that pass their tests."""

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    r"""Return an unbiased estimate of pass@k: the probability that at least one of k programs passes.

    $$\text{pass@}k = 1 - \binom{n - c}{k} / \binom{n}{k}$$

    Args:
        samples: The number n of programs drawn for a problem.
        passed: The number c of them that pass its tests.
        k: The number of attempts.

    Raises:
        ValueError: ``k`` or ``passed`` is out of range.

    References:
        Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 2.1. https://arxiv.org/abs/2107.03374

    Example:
        >>> round(pass_at_k(200, 31, 1), 3), round(pass_at_k(200, 31, 10), 3)
        (0.155, 0.822)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to samples={samples}, got {k}")
    if not 0 <= passed <= samples:
        raise ValueError(f"passed must be from 0 to samples={samples}, got {passed}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
