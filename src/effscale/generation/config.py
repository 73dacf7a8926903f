"""Which tokens may follow, and when a row ends."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat, SupportsIndex, cast

from effscale.generation.prompts import integers
from effscale.models.validation import check, is_finite, is_integer

_INTEGERS = (
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "pad_id",
)
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")

TokenIds = SupportsIndex | Iterable[SupportsIndex]
Biases = Mapping[SupportsIndex, SupportsFloat] | Iterable[tuple[SupportsIndex, SupportsFloat]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which tokens may follow, and when a row ends.

    The options act in this order, that of transformers: ``logit_bias``, ``repetition_penalty``, ``no_repeat_ngram_size``,
    ``min_new_tokens``, then processors of your own, ``temperature``, ``top_k``, ``top_p``, ``min_p``. Those from ``temperature`` on
    act only when sampling. An option that is off costs nothing.

    Example:
        >>> SamplingConfig(temperature=0.8, top_k=50).greedy
        False
    """

    max_new_tokens: int = 128
    """Tokens after the prompt, at most."""
    min_new_tokens: int = 0
    """No stop token is drawn before a row has so many new tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token always."""
    top_k: int | None = None
    """Only the ``k`` most likely tokens may follow; None or 0: all."""
    top_p: float = 1.0
    """Only the fewest tokens whose probabilities reach ``p`` may follow (Holtzman et al., 2019); 1: all."""
    min_p: float = 0.0
    """Only tokens at least ``min_p`` times as probable as the likeliest one may follow (Nguyen et al., 2024); 0: all."""
    repetition_penalty: float = 1.0
    """Tokens already in the row (prompt included) have a positive logit divided by it, a negative one multiplied
    (Keskar et al., 2019, section 4.1); 1: nothing."""
    no_repeat_ngram_size: int = 0
    """No ``n`` tokens in succession occur twice in a row (prompt included; Paulus et al., 2017, section 2.5); 0: they may."""
    logit_bias: Biases = ()
    """Numbers that are added to the logits of some tokens, from their ids; minus infinity forbids one. May be a dict, and is
    kept as a sorted tuple of pairs."""
    num_return_sequences: int = 1
    """Answers to each prompt, which lie one after the other. The prompt is computed once."""
    stop_ids: TokenIds = ()
    """A row ends with the first of these that it draws. May be one id or any list, tuple or array of them, and is kept as a tuple."""
    pad_id: int = 0
    """Fills rows that have ended."""

    def __post_init__(self):
        # JAX needs a config that is hashable, and numbers that adapt to the type of the logits.
        for name in _INTEGERS:
            value = getattr(self, name)
            optional = name == "top_k" and value is None
            check(self, optional or is_integer(value), name, "an integer")
            object.__setattr__(self, name, None if optional else int(value))
        for name in _NUMBERS:
            value = getattr(self, name)
            check(self, is_finite(value), name, "a finite number")
            object.__setattr__(self, name, float(value))
        self._keep_stop_ids()
        self._keep_logit_bias()
        check(self, self.top_k is None or self.top_k >= 0, "top_k", "at least 0, or None")
        object.__setattr__(self, "top_k", self.top_k or None)
        check(self, self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        fits = 0 <= self.min_new_tokens <= self.max_new_tokens
        wanted = f"from 0 to max_new_tokens={self.max_new_tokens}"
        check(self, fits, "min_new_tokens", wanted)
        sensible = self.temperature == 0 or self.temperature >= 1e-6
        check(self, sensible, "temperature", "0 (greedy), or at least 1e-6")
        check(self, 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(self, 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(self, self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(self, self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "at least 0")
        check(self, self.num_return_sequences >= 1, "num_return_sequences", "at least 1")
        differ = not self.greedy or self.num_return_sequences == 1
        wanted = "1 where decoding is greedy: all answers to a prompt would be the same"
        check(self, differ, "num_return_sequences", wanted)
        check(self, self.pad_id >= 0, "pad_id", "a token id")

    def _keep_stop_ids(self) -> None:
        stops = integers(self.stop_ids)
        wanted = "an integer, or a list, tuple or array of integers"
        check(self, stops is not None and stops.ndim <= 1, "stop_ids", wanted)
        object.__setattr__(self, "stop_ids", () if stops is None else tuple(stops.ravel().tolist()))

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
        """``logit_bias`` as it is kept: pairs of a token id and a number."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether no randomness is involved."""
        return self.temperature == 0 or self.top_k == 1
