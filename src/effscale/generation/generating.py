"""The main entry point of generation, which validates its arguments and the result."""

from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from effscale.generation.checks import (
    checked_key,
    checked_mask,
    checked_processors,
    checked_prompt,
    refuse_failures,
)
from effscale.generation.config import SamplingConfig
from effscale.generation.decoding import Generated, decode
from effscale.generation.processors import LogitsProcessor
from effscale.generation.streaming import stream
from effscale.generation.text import AnswerText, Tokenizer, checked_strings, end_at_strings
from effscale.models import Transformer


def generate(
    model: Transformer,
    prompt: Any,
    config: SamplingConfig | None = None,
    *,
    attention_mask: Any = None,
    key: PRNGKeyArray | None = None,
    processors: Iterable[LogitsProcessor] = (),
    stop_strings: str | Iterable[str] = (),
    tokenizer: Tokenizer | None = None,
    log_probs: bool = False,
    logits: bool = False,
    scores: bool = False,
) -> Generated:
    """Continue each row of ``prompt``, checking the arguments and the result.

    Args:
        model: A causal model with a head named ``lm``. If you call this often, pass ``effscale.models.unroll(model)``; see
            ``effscale.generation.decode``.
        prompt: Token ids of shape ``(batch, seq)``, padded on the left; ``left_pad`` makes one from lists.
        config: Length, filters and stop tokens.
        attention_mask: ``(batch, seq)``, nonzero at real tokens; None: all are real.
        key: Key for sampling; optional if greedy. The same key gives the same tokens, and the tokens of a row do not
            depend on the other rows.
        processors: Custom functions ``(logits, history) -> logits``; see ``effscale.generation.decode``.
        stop_strings: A row ends with the token that completes one of these strings in the text of its answer; strings may
            begin and end inside a token. The text is checked every few tokens; ``answer_texts`` cuts it where the string
            begins.
        tokenizer: Tokenizer that turns tokens into text; needed only for ``stop_strings``.
        log_probs: Whether to return the log-probabilities of the new tokens.
        logits: Whether to return the model's logits of each new token.
        scores: Whether to return the scores that each new token was drawn from.

    Returns:
        Tokens of shape ``(batch * num_return_sequences, seq + max_new_tokens)``, their mask, and the length of each answer;
        see ``effscale.generation.Generated``.

    Raises:
        ValueError: The model is not causal or has no ``lm`` head; the prompt is not an array of integers, contains an
            id outside the vocabulary, is empty or padded on the right, or leaves too few positions for the answer;
            ``key`` is missing or not a PRNG key; ``stop_strings`` is passed without a tokenizer; the model's logits become
            NaN or infinite, or every token is excluded.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> out = generate(model, [[3, 1, 4]], SamplingConfig(max_new_tokens=5, temperature=0.0))
        >>> out.tokens.shape
        (1, 8)
    """
    config = SamplingConfig() if config is None else config
    strings = checked_strings(stop_strings)
    own = checked_processors(processors)
    kept = {"log_probs": log_probs, "logits": logits, "scores": scores}
    if strings:
        if tokenizer is None:
            raise ValueError(f"stop_strings={strings!r} needs a tokenizer. Pass tokenizer=")
        drawn = stream(
            model, prompt, config, attention_mask=attention_mask, key=key, processors=own, **kept
        )
        rows = drawn.prompts()
        end_at_strings(drawn, [AnswerText(tokenizer, row, stop_strings=strings) for row in rows])
        return drawn.generated()
    tokens = checked_prompt(model, prompt, config)
    mask = checked_mask(attention_mask, tokens)
    out = decode(
        model, tokens, config, attention_mask=mask, key=checked_key(key), processors=own, **kept
    )
    # Inside the caller's jit, the values are not known yet.
    if not isinstance(out.failed, jax.core.Tracer):
        refuse_failures(out.failed, model, config, own)
    return out
