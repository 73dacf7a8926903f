"""Read ``generation_config.json``, the sampling settings that a model's authors recommend."""

import dataclasses
import math
import os
import pathlib
import warnings
from typing import Any

from effscale.generation import SamplingConfig
from effscale.interop.folder import read_json
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.options import did_you_mean

NAME = "generation_config.json"

# The default of transformers for files that enable sampling without setting top_k.
_TOP_K = 50

_ALWAYS = {
    "min_new_tokens": "whole",
    "repetition_penalty": "number",
    "no_repeat_ngram_size": "whole",
    "num_return_sequences": "whole",
}
_IF_SAMPLING = {"temperature": "number", "top_p": "number", "min_p": "number"}
_READ = {
    *_ALWAYS, *_IF_SAMPLING, "do_sample", "top_k", "max_new_tokens", "max_length", "min_length", "eos_token_id",
    "pad_token_id", "suppress_tokens",
}  # fmt: skip
# Fields that are not supported, with the value at which each has no effect.
_NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0, "typical_p": 1, "epsilon_cutoff": 0,
    "eta_cutoff": 0, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1,
    "remove_invalid_values": False, "token_healing": False, "use_mtp": False,
}  # fmt: skip
_NEEDS_SAMPLING = {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
# Fields that affect only speed, memory or reporting, or that need features this library does not have.
_HARMLESS = {
    "bos_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "return_dict_in_generate", "return_legacy_cache", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "renormalize_logits", "length_penalty", "early_stopping", "low_memory",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size",
}  # fmt: skip


def sampling_from_folder(
    folder: str | os.PathLike[str],
    *,
    do_sample: bool | None = None,
    prompt_length: int | None = None,
    **changes: Any,
) -> SamplingConfig:
    """Read the sampling settings of a model folder's ``generation_config.json``, as transformers does.

    These fields are read:

    - ``do_sample``; without it, decoding is greedy
    - ``temperature``, ``top_p``, ``min_p``, and ``top_k`` (50 if the file enables sampling without setting it)
    - ``repetition_penalty``, ``no_repeat_ngram_size``, ``num_return_sequences``, ``suppress_tokens``
    - ``max_new_tokens`` or ``max_length``, ``min_new_tokens`` or ``min_length``
    - ``eos_token_id`` and ``pad_token_id`` (by default the first stop token)

    If the file does not set the length, ``SamplingConfig``'s default applies instead of transformers' 20 tokens. In a folder
    without that file, the same fields are read from ``config.json``.

    Args:
        folder: A local model folder.
        do_sample: Whether to sample; overrides the file.
        prompt_length: Length of the prompts including padding; needed for ``max_length`` and ``min_length``, which count the
            prompt.
        **changes: Fields of ``SamplingConfig`` that override the file. A ``temperature`` above 0 enables sampling with the
            file's filters.

    Raises:
        FolderError: The folder or file does not exist, or a field has an invalid value; a ``ValueError``.
        ValueError: A change is not a field of ``SamplingConfig``.

    Warns:
        UserWarning: Some fields, such as ``num_beams``, would affect the output but are not supported; the warning names
            them.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> fields = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 64, "eos_token_id": [2, 7]}
        >>> _ = (folder / "generation_config.json").write_text(json.dumps(fields))
        >>> sampling_from_folder(folder, temperature=0.7).stop_token_ids
        (2, 7)
    """
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    for name in changes:
        if name not in names:
            raise ValueError(
                f"{name} is not a field of SamplingConfig: {did_you_mean(name, names)}"
            )
    path = _file_of(pathlib.Path(folder))
    fields = Fields(repr(str(path)), read_json(path.parent, path.name))
    if do_sample is None and "temperature" in changes:
        do_sample = changes["temperature"] != 0
    if do_sample is None:
        do_sample = fields.flag("do_sample", False)
    found = _sampling_of(fields, do_sample) | _lengths_of(fields, prompt_length, changes)
    if path.name == NAME:
        _warn_of_others(fields, do_sample)
    try:
        return SamplingConfig(**found | changes)
    except ValueError as error:
        also = f", with {changes}" if changes else ""
        raise FolderError(f"{fields.where}{also}: {error}") from error


def _file_of(folder: pathlib.Path) -> pathlib.Path:
    for name in (NAME, "config.json"):
        if os.path.isfile(folder / name):
            return folder / name
    if not os.path.isdir(folder):
        raise FolderError(f"folder must be a local folder, got {str(folder)!r}")
    there = ", ".join(sorted(os.listdir(folder))[:20]) or "nothing"
    raise FolderError(f"{str(folder)!r}: no {NAME} and no config.json; the folder contains {there}")


def _sampling_of(fields: Any, do_sample: bool) -> dict[str, Any]:
    """Return the fields that do not depend on the prompt, under this library's names."""
    read = lambda kinds: {name: getattr(fields, kind)(name, None) for name, kind in kinds.items()}
    found = read(_ALWAYS)
    if do_sample:
        found |= read(_IF_SAMPLING) | {"top_k": fields.whole("top_k", _TOP_K)}
    else:
        found["temperature"] = 0.0
    several = isinstance(fields.values.get("eos_token_id"), list)
    # Some files use -1 for none.
    ends = (
        fields.wholes("eos_token_id") if several else [fields.whole("eos_token_id", -1, least=-1)]
    )
    pad = fields.whole("pad_token_id", -1, least=-1)
    found["stop_token_ids"] = tuple(end for end in ends if end >= 0)
    found["pad_token_id"] = pad if pad >= 0 else next(iter(found["stop_token_ids"]), None)
    found["logit_bias"] = dict.fromkeys(fields.wholes("suppress_tokens", []), -math.inf)
    return {name: value for name, value in found.items() if value is not None}


def _lengths_of(fields: Any, prompt_length: int | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the minimum and maximum number of new tokens, if the file sets them."""
    found = {}
    for name, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        new, length = fields.whole(name, None), fields.whole(whole, None)
        if new is not None:
            found[name] = new
        elif length and name not in changes:
            if prompt_length is None:
                warnings.warn(
                    f"{fields.where}: {whole}={length} is ignored because it counts the prompt. Pass prompt_length= or {name}=",
                    stacklevel=3,
                )
            else:
                found[name] = max(length - prompt_length, 0)
    return found


def _warn_of_others(fields: Any, do_sample: bool) -> None:
    acts = lambda name, value: (
        not (
            name in _READ
            or name in _HARMLESS
            or name.startswith("_")
            or value in (None, [], {})
            or (name in _NEUTRAL and value == _NEUTRAL[name])
            or (name in _NEEDS_SAMPLING and not do_sample)
        )
    )
    left = {name: value for name, value in fields.values.items() if acts(name, value)}
    if left:
        said = ", ".join(f"{name}={shown(value)}" for name, value in left.items())
        hint = ". Pass stop_strings= to generate" if "stop_strings" in left else ""
        warnings.warn(f"{fields.where}: ignoring unsupported fields: {said}{hint}", stacklevel=3)
