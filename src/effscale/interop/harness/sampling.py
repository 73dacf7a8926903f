"""Convert the generation options of a task to a config of this library."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from effscale.generation import SamplingConfig
from effscale.interop import sampling_from_folder
from effscale.interop.harness.codec import Codec
from effscale.interop.source import gguf_path
from effscale.options import PositiveInt, checked, did_you_mean

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


def sampling_of(
    gen_kwargs: Mapping[str, Any],
    codec: Codec,
    *,
    folder: str | os.PathLike[str] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> tuple[SamplingConfig, list[str]]:
    """Return a task's ``generation_kwargs`` as a config, and its stop strings.

    Args:
        gen_kwargs: ``until``, ``do_sample``, ``temperature``, ``max_gen_toks`` or one of its other names, and `FIELDS`.
        codec: The codec that defines the end token.
        folder: The folder of ``generation_config.json``, the defaults for options that the task does not set, as for the
            harness's ``hf`` model.
        stop_ids: Additional tokens that end a text.

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
    ends = [*config.stop_ids, *stop_ids]  # pyrefly: ignore[not-iterable]
    if codec.end_id is not None:
        ends.append(codec.end_id)
    return dataclasses.replace(config, stop_ids=tuple(dict.fromkeys(ends))), until
