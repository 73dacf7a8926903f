"""What the harness asks of a model: whether it can be evaluated, how long its texts are, and answers sampled as a task says."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from effscale.evaluation.continuations import BUCKET, padded
from effscale.generation import SamplingConfig, left_pad, stream
from effscale.generation.text import AnswerText, end_at_strings
from effscale.interop import sampling_from_folder
from effscale.interop.harness.codec import Codec
from effscale.interop.source import gguf_path
from effscale.models import Transformer
from effscale.moe import MoEConfig
from effscale.options import PositiveInt, checked, did_you_mean

MAX_LENGTH = 2048
"""The default for the maximum number of tokens that a model reads, as in the harness."""

MAX_GEN_TOKS = 256
"""The default number of new tokens, as in the harness."""

TOP_K = 50
"""The default of top_k in sampling, as in transformers."""

FIELDS = (
    "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens",
)  # fmt: skip
"""The fields of ``SamplingConfig`` that a task may set under the same names, in addition to ``temperature``."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names for the maximum number of new tokens; the first one present counts."""


def check_model(model: Any) -> None:
    """Raise an error for a Transformer that does not predict the next token, or whose rows depend on other rows of the batch.

    Raises:
        ValueError: The model cannot be evaluated; the message says what to do.
    """
    if not isinstance(model, Transformer):
        return
    if not (model.config.causal and "lm" in model.heads):
        raise ValueError(
            f"the harness needs a causal model with a head named 'lm', got heads {list(model.heads)}"
        )
    for number, block in enumerate(model.config.layers):
        part = block.feed_forward
        capacity = part.router.eval_capacity_factor if isinstance(part, MoEConfig) else None
        if capacity is not None:
            raise ValueError(
                f"the experts of layer {number} have eval_capacity_factor={capacity}, so the rows of a batch would compete for them. "
                "Evaluate the model with RouterConfig(eval_capacity_factor=None); effscale.models.with_config changes it."
            )


def length_of(model: Any, codec: Codec, given: int | None) -> int:
    """Return the maximum number of tokens that a model reads: as given, or by its files, its positions or its tokenizer.

    Raises:
        ValueError: ``given`` is below 1 or above the number of positions of the model.
    """
    positions = model.config.max_length if isinstance(model, Transformer) else None
    if given is None:
        known = (length for length in (codec.max_length, positions) if length is not None)
        return min(known, default=MAX_LENGTH)
    if given < 1 or (positions is not None and given > positions):
        most = "" if positions is None else f", and at most the model's {positions} positions"
        raise ValueError(f"max_length must be at least 1{most}, got {given}")
    return given


def sampling_of(
    gen_kwargs: Mapping[str, Any],
    codec: Codec,
    *,
    folder: str | os.PathLike[str] | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> tuple[SamplingConfig, list[str]]:
    """Return a task's ``generation_kwargs`` as a config, and its stop strings.

    Args:
        gen_kwargs: ``until``, ``do_sample``, ``temperature``, ``max_gen_toks`` or one of its other names, and `FIELDS`.
        codec: The codec that defines the end token.
        folder: The folder of ``generation_config.json``, the defaults for options that the task does not set, as for the
            harness's ``hf`` model.
        stop_token_ids: Additional tokens that end a text.

    Raises:
        ValueError: An argument is unknown or has an invalid value.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    if not isinstance(gen_kwargs, Mapping):
        raise ValueError(f"generation_kwargs must be a dict, got {gen_kwargs!r}")
    given: dict[str, Any] = {**normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_TOKS)}
    until = handle_stop_sequences(given.pop("until"), eos=codec.end_text)
    new, sample = given.pop("max_gen_toks"), given.pop("do_sample")
    new = checked(next((n for n in LENGTHS if n in gen_kwargs), LENGTHS[0]), new, PositiveInt)
    temperature = float(given.pop("temperature", 0.0))
    if sample and not temperature > 0:
        raise ValueError(
            f"temperature must be above 0 with do_sample=True, got {temperature:g}. Use, for instance, temperature=1.0."
        )
    for name, harmless in (("num_beams", 1), ("num_return_sequences", 1)):
        if given.pop(name, harmless) != harmless:
            raise ValueError(f"{name} must be {harmless}, got {gen_kwargs[name]!r}")
    for name in given:
        if name not in FIELDS:
            known = ("until", "do_sample", "temperature", *LENGTHS, *FIELDS)
            raise ValueError(
                f"generation_kwargs must be known options, got {name}={given[name]!r}: {did_you_mean(name, known)}"
            )
    fields: dict[str, Any] = {
        **given,
        "max_new_tokens": new,
        "temperature": temperature if sample else 0.0,
        "num_return_sequences": 1,
    }
    if folder is not None and gguf_path(pathlib.Path(folder)) is None:
        config = sampling_from_folder(folder, **fields)
    else:
        fields.setdefault("top_k", TOP_K if sample else None)
        config = SamplingConfig(**fields)
    ends = [*config.stop_token_ids, *stop_token_ids]  # pyrefly: ignore[not-iterable]
    if codec.eos_token_id is not None:
        ends.append(codec.eos_token_id)
    return dataclasses.replace(config, stop_token_ids=tuple(dict.fromkeys(ends))), until


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
