"""Sampling options: which tokens may follow, and when a row ends."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, SupportsFloat, SupportsIndex, cast

from effscale.generation.prompts import integers
from effscale.options import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    check,
    is_finite,
    is_integer,
)

TokenIds = SupportsIndex | Iterable[SupportsIndex]
Biases = Mapping[SupportsIndex, SupportsFloat] | Iterable[tuple[SupportsIndex, SupportsFloat]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Options):
    """Sampling options: which tokens may follow, and when a row ends.

    The options are applied in this order, which is that of transformers: ``logit_bias``, ``repetition_penalty``,
    ``no_repeat_ngram_size``, ``min_new_tokens``, then custom processors, ``temperature``, ``top_k``, ``top_p``, ``min_p``.
    ``temperature`` and the options after it apply only when sampling. Options that are off cost nothing.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019), for ``top_p``. https://arxiv.org/abs/1904.09751
        Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs" (2024).
            https://arxiv.org/abs/2407.01082
        Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation" (2019), section 4.1, for
            ``repetition_penalty``. https://arxiv.org/abs/1909.05858
        Paulus et al., "A Deep Reinforced Model for Abstractive Summarization" (2017), section 2.5, for
            ``no_repeat_ngram_size``. https://arxiv.org/abs/1705.04304

    Example:
        >>> SamplingConfig(temperature=0.8, top_k=50).greedy
        False
    """

    max_new_tokens: PositiveInt = 128
    """Maximum number of tokens to generate."""
    min_new_tokens: NonNegativeInt = 0
    """Minimum number of tokens to generate before a stop token can be drawn."""
    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits; 0 always takes the most likely token (greedy decoding)."""
    top_k: NonNegativeInt | None = None
    """Sample only from the ``k`` most likely tokens; None or 0: from all."""
    top_p: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Sample only from the smallest set of tokens whose probabilities sum to at least ``p``; 1: from all."""
    min_p: Fraction = 0.0
    """Sample only from tokens at least ``min_p`` times as probable as the most likely one; 0: from all."""
    repetition_penalty: PositiveFloat = 1.0
    """Penalty for tokens that the row already contains, including the prompt: divides their positive logits and multiplies their
    negative ones; 1: no penalty."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """Forbid any ``n`` consecutive tokens from occurring twice in a row, including the prompt; 0: no restriction."""
    logit_bias: Biases = ()
    """Values to add to the logits of some tokens, by token id; minus infinity forbids a token. May be a dict; stored as a
    sorted tuple of pairs."""
    num_return_sequences: PositiveInt = 1
    """Number of answers per prompt, returned as consecutive rows. The prompt is computed only once."""
    stop_token_ids: TokenIds = ()
    """Token ids that end a row when drawn. May be one id or a list, tuple or array; stored as a tuple."""
    pad_token_id: NonNegativeInt = 0
    """Token id that fills rows that have ended."""

    def __post_init__(self):
        self._keep_stop_token_ids()
        self._keep_logit_bias()
        super().__post_init__()
        object.__setattr__(self, "top_k", self.top_k or None)
        fits = self.min_new_tokens <= self.max_new_tokens
        wanted = f"from 0 to max_new_tokens={self.max_new_tokens}"
        check(self, fits, "min_new_tokens", wanted)
        sensible = self.temperature == 0 or self.temperature >= 1e-6
        check(self, sensible, "temperature", "0 (greedy) or at least 1e-6")
        differ = not self.greedy or self.num_return_sequences == 1
        wanted = "1 with greedy decoding, where all answers to a prompt would be the same"
        check(self, differ, "num_return_sequences", wanted)

    def _keep_stop_token_ids(self) -> None:
        stops = integers(self.stop_token_ids)
        wanted = "an integer, or a list, tuple or array of integers"
        check(self, stops is not None and stops.ndim <= 1, "stop_token_ids", wanted)
        object.__setattr__(
            self, "stop_token_ids", () if stops is None else tuple(stops.ravel().tolist())
        )

    def _keep_logit_bias(self) -> None:
        given: Any = self.logit_bias
        wanted = "a dict from token ids to finite numbers or minus infinity"
        try:
            given = given.items() if isinstance(given, Mapping) else given
            pairs: list[tuple[Any, Any]] = [(i, b) for i, b in given]
        except (TypeError, ValueError):
            pairs = [(None, None)]
        forbids = lambda b: isinstance(b, float) and b == -math.inf
        right = all(is_integer(i) and i >= 0 and (is_finite(b) or forbids(b)) for i, b in pairs)
        check(self, right and len(dict(pairs)) == len(pairs), "logit_bias", wanted)
        kept = tuple(sorted((int(i), float(b)) for i, b in pairs))
        object.__setattr__(self, "logit_bias", kept)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as it is stored: pairs of a token id and a value."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether decoding is deterministic."""
        return self.temperature == 0 or self.top_k == 1
