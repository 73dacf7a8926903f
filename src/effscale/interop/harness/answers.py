"""Generate answers to a batch of contexts, up to the first stop string."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from effscale.evaluation.continuations import BUCKET, padded
from effscale.generation import AnswerText, SamplingConfig, left_pad, stream
from effscale.generation.text import end_at_strings
from effscale.interop.harness.codec import Codec
from effscale.models import Transformer


def continue_texts(
    model: Transformer,
    codec: Codec,
    contexts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    until: Sequence[str],
    key: PRNGKeyArray,
    rows: int,
    room: int,
) -> list[str]:
    """Return the text after each context, without the stop string that ends it.

    As in the harness, answers are decoded separately from their context: a tokenizer that drops the first space of a text
    drops theirs.

    Args:
        model: A causal model with a head named ``lm``, unrolled.
        codec: The codec that decodes answers.
        contexts: Token ids of at most ``rows`` contexts.
        sampling: The length, filters and stop tokens.
        until: The stop strings.
        key: The key for sampling.
        rows: The number of rows in the compiled batch.
        room: The maximum number of tokens in a context; the batch is padded to one of few lengths up to it.
    """
    from lm_eval.models.utils import postprocess_generated_text

    count = len(contexts)
    tokens, mask = left_pad([*contexts, *[contexts[-1]] * (rows - count)])
    more = min(padded(tokens.shape[1], BUCKET), room) - tokens.shape[1]
    tokens, mask = (np.pad(array, ((0, 0), (more, 0))) for array in (tokens, mask))
    drawn = stream(model, tokens, sampling, attention_mask=mask, key=key)
    for row in range(count, rows):
        drawn.stop(row, 0)
    end_at_strings(drawn, [AnswerText(codec.tokenizer, stop_strings=until) for _ in tokens])
    out = drawn.generated()
    new, lengths = jax.device_get((out.tokens[:, tokens.shape[1] :], out.num_new))
    texts = [codec.decode(ids[:length].tolist()) for ids, length in zip(new, lengths, strict=True)]
    cut = lambda text: postprocess_generated_text(text, stop=list(until), think_end_token=None)
    return [cut(text) for text in texts[:count]]
