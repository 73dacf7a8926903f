"""The text of answers: token by token, in whole characters and words, up to a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from effscale.generation.config import SamplingConfig
from effscale.generation.decoding import Generated
from effscale.generation.processors import LogitsProcessor
from effscale.generation.streaming import Stream, stream
from effscale.models import Transformer

# What a decoder returns for bytes that are not, or not yet, a complete character.
REPLACEMENT = "\ufffd"
# A decoder needs this many tokens of context to decide whether the next one starts with a space.
CONTEXT = 5


@runtime_checkable
class Tokenizer(Protocol):
    """The methods that text needs from a tokenizer; those of tokenizers and transformers have them."""

    def encode(self, sequence: str, /) -> Any:
        """Return token ids, or an object that has them as ``ids``."""
        ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        ...


class AnswerText:
    """The text of one answer while its tokens arrive.

    Tokens of a byte-level vocabulary may contain part of a character, and stop strings may begin and end inside a token.

    Args:
        tokenizer: Tokenizer that turns tokens into text.
        prompt: The tokens before the answer.
        stop_strings: The text ends before the first of these strings that occurs in it.
        skip_special_tokens: Whether to leave special tokens, such as the one that ends a row, out of the text.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["one two three"] * 3, vocab_size=262)
        >>> answer = AnswerText(tokenizer, stop_strings=["th"])
        >>> [answer.add(token) for token in tokenizer.encode("one two three").ids][-1], answer.text
        (True, 'one two ')
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop_strings: str | Iterable[str] = (),
        skip_special_tokens: bool = True,
    ):
        self.text = ""
        self.num_tokens = 0
        self.ended = False
        self._stops = checked_strings(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        # Tokens whose text is known, followed by those whose text is not complete yet.
        self._known = list(prompt)[-CONTEXT:]
        self._pending: list[int] = []
        self._taken = 0

    def add(self, token: int) -> bool:
        """Add a token; return True if the text ends here with a stop string."""
        if not self.ended:
            self.num_tokens += 1
            self._pending.append(token)
            self._read(at_end=False)
        return self.ended

    def end(self) -> str:
        """Return the whole text, once no further token follows."""
        if not self.ended:
            self._read(at_end=True)
            self.ended = True
        return self.text

    def take(self, *, words: bool = False) -> str:
        """Return the text that was not taken yet and that no further token can change.

        Args:
            words: Return only up to the last white space, unless the text has ended. Chinese and Japanese characters count as
                words.
        """
        stop = len(self.text)
        if not self.ended:
            stop -= self._begun()
            while words and stop > self._taken and not _is_boundary(self.text[stop - 1]):
                stop -= 1
        piece = self.text[self._taken : stop]
        self._taken = max(self._taken, stop)
        return piece

    def _read(self, *, at_end: bool) -> None:
        before = self._decode(self._known)
        now = self._decode(self._known + self._pending)
        new = now[len(before) :]
        if not new or (now.endswith(REPLACEMENT) and not at_end):
            return
        self._known, self._pending = self._pending, []
        begin = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [at for at in (self.text.find(stop, begin) for stop in self._stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ended = True

    def _begun(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0


def end_at_strings(drawn: Stream, answers: Sequence[AnswerText]) -> None:
    """Run a stream to its end, and end each row where its text contains a stop string."""
    for new in drawn:
        for row, answer in enumerate(answers):
            for token in new.tokens[row, new.mask[row]].tolist():
                if answer.add(token):
                    drawn.stop(row, answer.num_tokens)
                    break


def answer_texts(
    tokenizer: Tokenizer,
    generated: Generated,
    *,
    stop_strings: str | Iterable[str] = (),
    skip_special_tokens: bool = True,
) -> list[str]:
    """Return the text of each answer, without its prompt, cut where the first stop string begins.

    Args:
        tokenizer: Tokenizer that turns tokens into text.
        generated: From ``effscale.generation.generate`` or ``effscale.generation.decode``.
        stop_strings: The strings passed to ``generate``, or others.
        skip_special_tokens: Whether to leave special tokens out of the text.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.data import train_tokenizer
        >>> from effscale.generation.decoding import Generated
        >>> tokenizer = train_tokenizer(["one two three"] * 3, vocab_size=262)
        >>> tokens = jnp.asarray([tokenizer.encode("one two three").ids])
        >>> prompt = len(tokenizer.encode("one").ids)
        >>> new = jnp.asarray([tokens.shape[1] - prompt])
        >>> out = Generated(tokens, jnp.ones(tokens.shape, bool), new, jnp.asarray([False]))
        >>> answer_texts(tokenizer, out, stop_strings="hr")
        [' two t']
    """
    strings = checked_strings(stop_strings)
    texts = []
    tokens, mask, lengths = jax.device_get((generated.tokens, generated.mask, generated.num_new))
    for row, real, length in zip(tokens, mask, lengths, strict=True):
        prompt, answer = np.split(row[real], [int(real.sum() - length)])
        text = AnswerText(
            tokenizer,
            prompt.tolist(),
            stop_strings=strings,
            skip_special_tokens=skip_special_tokens,
        )
        for token in answer.tolist():
            text.add(token)
        texts.append(text.end())
    return texts


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    config: SamplingConfig | None = None,
    *,
    key: PRNGKeyArray | None = None,
    stop_strings: str | Iterable[str] = (),
    chunk: int = 8,
    words: bool = True,
    skip_special_tokens: bool = True,
    processors: Iterable[LogitsProcessor] = (),
) -> Iterator[str]:
    """Continue one text and yield the answer in pieces as they are drawn.

    Args:
        model: A causal model with a head named ``lm``.
        tokenizer: The model's tokenizer.
        prompt: A text, or its token ids.
        config: Length, filters and stop tokens.
        key: Key for sampling; optional if greedy.
        stop_strings: The answer ends before the first of these strings.
        chunk: Number of tokens to draw at a time.
        words: Whether a piece ends with a whole word; otherwise with a whole character.
        skip_special_tokens: Whether to leave special tokens out of the text.
        processors: Custom functions ``(logits, history) -> logits``; see ``effscale.generation.decode``.

    Returns:
        An iterator over non-empty pieces of text.

    Raises:
        ValueError: As ``effscale.generation.stream``; or the config requests more than one answer.
    """
    config = SamplingConfig() if config is None else config
    if config.num_return_sequences != 1:
        raise ValueError(
            f"num_return_sequences must be 1 for stream_text, got {config.num_return_sequences}. Use stream for more answers"
        )
    encoded = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = list(getattr(encoded, "ids", encoded))
    answer = AnswerText(
        tokenizer, ids, stop_strings=stop_strings, skip_special_tokens=skip_special_tokens
    )
    drawn = stream(model, [ids], config, key=key, chunk=chunk, processors=processors)
    return _pieces(drawn, answer, words)


def checked_strings(strings: str | Iterable[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple, or raise an error that names one that is empty or not a string."""
    found = (strings,) if isinstance(strings, str) else tuple(strings)
    for one in found:
        if not isinstance(one, str) or not one:
            raise ValueError(f"stop_strings must be non-empty strings, got {one!r}")
    return found


def _pieces(drawn: Stream, answer: AnswerText, words: bool) -> Iterator[str]:
    for new in drawn:
        for token in new.tokens[0, new.mask[0]].tolist():
            answer.add(token)
        if piece := answer.take(words=words):
            yield piece
        if answer.ended:
            return
    answer.end()
    if piece := answer.take():
        yield piece


def _is_boundary(character: str) -> bool:
    return (
        character.isspace()
        or "\u2e80" <= character <= "\u9fff"
        or "\U00020000" <= character <= "\U0003ffff"
    )
