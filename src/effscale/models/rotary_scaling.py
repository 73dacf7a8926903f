"""Scaling of rotary frequencies, for models extended to longer sequences than they were first trained on."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from effscale.options import Options, PositiveFloat, PositiveInt, check

Frequencies = Float[np.ndarray, "pairs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(Options):
    """Position interpolation: divide positions by ``factor``.

    References:
        Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023).
            https://arxiv.org/abs/2306.15595
    """

    factor: PositiveFloat
    """Ratio of the extended sequence length to the original one."""

    @property
    def amplitude(self) -> float:
        """Return the factor that multiplies sine and cosine."""
        return 1.0

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """Return the frequencies to use in place of ``base^(-2i/dim)``."""
        del base
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Options):
    r"""Llama 3.1's scaling: slow pairs are divided by ``factor``, fast pairs are unchanged, and those between are mixed.

    With $r$ the turns that a pair makes over ``original_max_length`` positions, its frequency is multiplied by

    $$s + \frac{1 - s}{\text{factor}}, \quad
        s = \operatorname{clip}\left(\frac{r - \text{low}}{\text{high} - \text{low}}, 0, 1\right)$$

    References:
        Grattafiori et al., "The Llama 3 Herd of Models" (2024), and the reference code of Llama 3.1.
            https://arxiv.org/abs/2407.21783
    """

    factor: PositiveFloat
    """Ratio of the extended sequence length to the original one."""
    low_freq_factor: PositiveFloat
    """Pairs with fewer turns than this are divided by ``factor``."""
    high_freq_factor: float
    """Pairs with more turns than this are unchanged."""
    original_max_length: PositiveInt
    """Sequence length of the original training."""

    def __post_init__(self):
        super().__post_init__()
        wanted = f"above low_freq_factor={self.low_freq_factor}"
        check(self, self.high_freq_factor > self.low_freq_factor, "high_freq_factor", wanted)

    @property
    def amplitude(self) -> float:
        """Return the factor that multiplies sine and cosine."""
        return 1.0

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """Return the frequencies to use in place of ``base^(-2i/dim)``."""
        del base
        turns = self.original_max_length * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        return _mixed(frequencies, np.clip((turns - low) / (high - low), 0, 1), self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Options):
    """YaRN: interpolate pairs with few turns, keep pairs with many turns, ramp between them, and sharpen the scores.

    ``mscale`` and ``mscale_all_dim`` are from DeepSeek-V2.

    References:
        Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), sections 3.2 and 3.4.
            https://arxiv.org/abs/2309.00071
    """

    factor: PositiveFloat
    """Ratio of the extended sequence length to the original one."""
    original_max_length: PositiveInt
    """Sequence length of the original training."""
    beta_fast: float = 32.0
    """Pairs with more turns than this over the original sequence length are unchanged."""
    beta_slow: PositiveFloat = 1.0
    """Pairs with fewer turns than this are divided by ``factor``."""
    attention_factor: PositiveFloat | None = None
    """Factor that multiplies sine and cosine; None: ``0.1 ln(factor) + 1``, or as ``mscale`` and ``mscale_all_dim`` define."""
    mscale: float | None = None
    """With ``mscale_all_dim``, sets the default ``attention_factor`` to ``(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim
    ln(factor) + 1)``. If either of the two is None or 0, both are ignored."""
    mscale_all_dim: float | None = None
    """See ``mscale``."""
    truncate: bool = True
    """Whether the ramp starts and ends at a whole pair."""

    def __post_init__(self):
        super().__post_init__()
        wanted = f"at least beta_slow={self.beta_slow}"
        check(self, self.beta_fast >= self.beta_slow, "beta_fast", wanted)

    @property
    def amplitude(self) -> float:
        """Return the factor that multiplies sine and cosine."""
        if self.attention_factor is not None:
            return self.attention_factor
        grown = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * grown + 1) / (self.mscale_all_dim * grown + 1)
        return grown + 1

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """Return the frequencies to use in place of ``base^(-2i/dim)``."""
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            """Return the pair that makes this many turns over the original sequence length."""
            return pairs * math.log(self.original_max_length / (turns * 2 * math.pi), base)

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        # The published code uses the same minimum width.
        width = last - first if last != first else 0.001
        return _mixed(
            frequencies, 1 - np.clip((np.arange(pairs) - first) / width, 0, 1), self.factor
        )


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling
"""Any of the ways to stretch rotary positions beyond the length of the training."""


def _mixed(frequencies: Frequencies, kept: Frequencies, factor: float) -> Frequencies:
    """Keep the fraction ``kept`` of each frequency and divide the rest by ``factor``."""
    return frequencies * (kept + (1 - kept) / factor)
