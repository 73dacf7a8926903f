"""Rotary frequencies of models that were made to read further than they were first trained to."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from effscale.models.validation import check

Frequencies = Float[np.ndarray, "pairs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by ``factor`` ("position interpolation").

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023.
    """

    factor: float
    """How many times further the model reads."""

    def __post_init__(self):
        check(self, self.factor > 0, "factor", "above 0")

    @property
    def amplitude(self) -> float:
        """What sine and cosine are multiplied by."""
        return 1.0

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """The frequencies to use in place of ``base^(-2i/dim)``."""
        del base
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    r"""Llama 3.1's: slow pairs are divided by ``factor``, fast ones stay, and those between are mixed.

    With $r$ the turns that a pair makes over ``original_max_length`` positions, its frequency is multiplied by

    $$s + \frac{1 - s}{\text{factor}}, \quad
        s = \operatorname{clip}\left(\frac{r - \text{low}}{\text{high} - \text{low}}, 0, 1\right)$$

    Source: Grattafiori et al., "The Llama 3 Herd of Models", 2024, and the reference code of Llama 3.1.
    """

    factor: float
    """How many times further the model reads."""
    low_freq_factor: float
    """Pairs of fewer turns than this are divided by ``factor``."""
    high_freq_factor: float
    """Pairs of more turns than this stay as they are."""
    original_max_length: int
    """The longest sequence of the first training."""

    def __post_init__(self):
        check(self, self.factor > 0, "factor", "above 0")
        check(self, self.low_freq_factor > 0, "low_freq_factor", "above 0")
        wanted = f"above low_freq_factor={self.low_freq_factor}"
        check(self, self.high_freq_factor > self.low_freq_factor, "high_freq_factor", wanted)
        check(self, self.original_max_length >= 1, "original_max_length", "at least 1")

    @property
    def amplitude(self) -> float:
        """What sine and cosine are multiplied by."""
        return 1.0

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """The frequencies to use in place of ``base^(-2i/dim)``."""
        del base
        turns = self.original_max_length * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        return _mixed(frequencies, np.clip((turns - low) / (high - low), 0, 1), self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: pairs of few turns are interpolated, of many stay, by a ramp over the pairs; and scores are sharpened.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, section 3.2 and 3.4;
    ``mscale`` and ``mscale_all_dim`` are DeepSeek-V2's.
    """

    factor: float
    """How many times further the model reads."""
    original_max_length: int
    """The longest sequence of the first training."""
    beta_fast: float = 32.0
    """Pairs of more turns than this over the first training's length stay as they are."""
    beta_slow: float = 1.0
    """Pairs of fewer turns than this are divided by ``factor``."""
    attention_factor: float | None = None
    """What sine and cosine are multiplied by; None: ``0.1 ln(factor) + 1``, or what the next two say."""
    mscale: float | None = None
    """With ``mscale_all_dim``: the default ``attention_factor`` is ``(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim
    ln(factor) + 1)``. One without the other has no effect, and neither has 0."""
    mscale_all_dim: float | None = None
    """See ``mscale``."""
    truncate: bool = True
    """Whether the ramp begins and ends at a whole pair."""

    def __post_init__(self):
        check(self, self.factor > 0, "factor", "above 0")
        check(self, self.original_max_length >= 1, "original_max_length", "at least 1")
        check(self, self.beta_slow > 0, "beta_slow", "above 0")
        wanted = f"at least beta_slow={self.beta_slow}"
        check(self, self.beta_fast >= self.beta_slow, "beta_fast", wanted)
        given = self.attention_factor
        check(self, given is None or given > 0, "attention_factor", "above 0, or None")

    @property
    def amplitude(self) -> float:
        """What sine and cosine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        grown = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * grown + 1) / (self.mscale_all_dim * grown + 1)
        return grown + 1

    def scale(self, frequencies: Frequencies, base: float) -> Frequencies:
        """The frequencies to use in place of ``base^(-2i/dim)``."""
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            """Which pair turns so often over the first training's length."""
            return pairs * math.log(self.original_max_length / (turns * 2 * math.pi), base)

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        # The least width is the published code's own.
        width = last - first if last != first else 0.001
        return _mixed(
            frequencies, 1 - np.clip((np.arange(pairs) - first) / width, 0, 1), self.factor
        )


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling
"""Any of the ways to stretch rotary positions beyond the length of the training."""


def _mixed(frequencies: Frequencies, kept: Frequencies, factor: float) -> Frequencies:
    """``kept`` of each frequency, the rest of it divided by ``factor``."""
    return frequencies * (kept + (1 - kept) / factor)
