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

# What a decoder gives for bytes that are no character, or not one yet.
REPLACEMENT = "\ufffd"
# So many tokens before a new one tell a decoder how it continues them, with a space or without.
CONTEXT = 5


@runtime_checkable
class Tokenizer(Protocol):
    """What text needs of a tokenizer; those of tokenizers and of transformers have it."""

    def encode(self, sequence: str, /) -> Any:
        """Token ids, or an object that has them as ``ids``."""
        ...

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """The text of tokens."""
        ...


class AnswerText:
    """The text of one answer while its tokens come.

    Tokens of a byte-level vocabulary may hold a part of a character, and stop strings may begin and end within a token.

    Args:
        tokenizer: What turns tokens into text.
        prompt: The tokens before the answer.
        stop_strings: The text ends before the first of these that occurs in it.
        skip_special_tokens: Whether special tokens, such as the one that ends a row, are no text.

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
        # Tokens whose text is known, in front of those whose text is not yet whole.
        self._known = list(prompt)[-CONTEXT:]
        self._pending: list[int] = []
        self._taken = 0

    def add(self, token: int) -> bool:
        """Adds a token; True if the text ends here with a stop string."""
        if not self.ended:
            self.num_tokens += 1
            self._pending.append(token)
            self._read(at_end=False)
        return self.ended

    def end(self) -> str:
        """The whole text, when no token follows."""
        if not self.ended:
            self._read(at_end=True)
            self.ended = True
        return self.text

    def take(self, *, words: bool = False) -> str:
        """The text that was not taken yet and that no further token can change.

        Args:
            words: Only up to the last white space, unless the text has ended. Chinese and Japanese characters are words.
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
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0


def end_at_strings(drawn: Stream, answers: Sequence[AnswerText]) -> None:
    """Runs a stream to its end, and ends each row where its text has a stop string."""
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
    """The text of each answer, without its prompt, cut where the first stop string begins.

    Args:
        tokenizer: What turns tokens into text.
        generated: From ``effscale.generation.generate`` or ``effscale.generation.decode``.
        stop_strings: Those that ``generate`` had, or others.
        skip_special_tokens: Whether special tokens are no text.

    Example:
        >>> import jax.numpy as jnp
        >>> from effscale.data import train_tokenizer
        >>> from effscale.generation import Generated
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
    """Continues one text and yields the answer in pieces as they come.

    Args:
        model: A causal model with a head named ``lm``.
        tokenizer: The model's.
        prompt: A text, or its token ids.
        config: Length, filters and stop tokens.
        key: For sampling; may be left out only when greedy.
        stop_strings: The answer ends before the first of these.
        chunk: How many tokens are drawn at once.
        words: Whether a piece ends with a whole word; otherwise with a whole character.
        skip_special_tokens: Whether special tokens are no text.
        processors: Functions of your own, ``(logits, history) -> logits``; see ``effscale.generation.decode``.

    Returns:
        An iterator over pieces of text, none of them empty.

    Raises:
        ValueError: As ``effscale.generation.stream``; or the config asks for several answers.
    """
    config = SamplingConfig() if config is None else config
    if config.num_return_sequences != 1:
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences}: stream_text gives one answer; use stream"
        )
    encoded = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = list(getattr(encoded, "ids", encoded))
    answer = AnswerText(
        tokenizer, ids, stop_strings=stop_strings, skip_special_tokens=skip_special_tokens
    )
    drawn = stream(model, [ids], config, key=key, chunk=chunk, processors=processors)
    return _pieces(drawn, answer, words)


def checked_strings(strings: str | Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple, or an error that names one that is empty or no string."""
    found = (strings,) if isinstance(strings, str) else tuple(strings)
    for one in found:
        if not isinstance(one, str) or not one:
            raise ValueError(f"stop_strings: {one!r} must be a string, not empty")
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
