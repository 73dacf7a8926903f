"""`generation_config.json`: what is read, what is told, what is refused; test_transformers.py compares scores."""

import json
import math
import warnings

import pytest

from effscale.generation import SamplingConfig
from effscale.interop import sampling_from_folder


def written(folder, name="generation_config.json", **fields):
    (folder / name).write_text(json.dumps(fields))
    return folder


def test_a_file_that_samples(tmp_path):
    fields = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "min_p": None,
        "eos_token_id": [5, 9],
        "suppress_tokens": [3],
        "max_length": 100,
        "min_length": 30,
        "repetition_penalty": 1.1,
        "num_beams": 1,
        "bos_token_id": 1,
        "_from_model_config": True,
    }
    found = sampling_from_folder(written(tmp_path, **fields), prompt_length=20)
    wanted = SamplingConfig(
        temperature=0.6,
        top_p=0.9,
        top_k=50,
        stop_token_ids=(5, 9),
        pad_token_id=5,
        logit_bias={3: -math.inf},
        max_new_tokens=80,
        min_new_tokens=10,
        repetition_penalty=1.1,
    )
    assert found == wanted


def test_a_file_without_do_sample_is_greedy_until_a_temperature_is_given(tmp_path):
    fields = {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "eos_token_id": 2, "pad_token_id": 0}
    folder = written(tmp_path, **fields)
    assert sampling_from_folder(folder) == SamplingConfig(temperature=0.0, stop_token_ids=2)
    sampled = SamplingConfig(temperature=0.6, top_p=0.9, stop_token_ids=2)
    assert sampling_from_folder(folder, do_sample=True) == sampled
    warmer = sampling_from_folder(folder, temperature=0.8, max_new_tokens=4)
    assert (warmer.temperature, warmer.top_p, warmer.max_new_tokens) == (0.8, 0.9, 4)
    assert sampling_from_folder(written(tmp_path, do_sample=True), temperature=0.0).greedy


def test_a_folder_without_the_file_has_its_stop_tokens_in_the_models_config(tmp_path):
    folder = written(tmp_path, "config.json", eos_token_id=7, pad_token_id=-1, n_embd=8)
    assert sampling_from_folder(folder) == SamplingConfig(
        temperature=0.0, stop_token_ids=7, pad_token_id=7
    )


def test_fields_that_would_change_the_answer_are_named(tmp_path):
    fields = {
        "num_beams": 4,
        "typical_p": 0.9,
        "stop_strings": ["."],
        "use_cache": False,
        "epsilon_cutoff": 0.0,
        "chat_format": "raw",
        "early_stopping": True,
    }
    folder = written(tmp_path, **fields)
    names = (
        r"num_beams=4, stop_strings=\['\.'\], chat_format='raw'\. Pass stop_strings= to generate$"
    )
    with pytest.warns(
        UserWarning, match=rf"generation_config\.json': ignoring unsupported fields: {names}"
    ):
        sampling_from_folder(folder)
    with pytest.warns(
        UserWarning, match=r"ignoring unsupported fields: num_beams=4, typical_p=0\.9"
    ):
        sampling_from_folder(folder, do_sample=True)


def test_lengths_that_count_the_prompt_need_its_length(tmp_path):
    folder = written(tmp_path, max_length=50, min_length=8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert sampling_from_folder(folder) == SamplingConfig(temperature=0.0)
    assert [str(w.message).split(": ")[1] for w in told] == [
        "max_length=50 is ignored because it counts the prompt. Pass prompt_length= or max_new_tokens=",
        "min_length=8 is ignored because it counts the prompt. Pass prompt_length= or min_new_tokens=",
    ]
    found = sampling_from_folder(folder, max_new_tokens=9, min_new_tokens=3)
    assert (found.max_new_tokens, found.min_new_tokens) == (9, 3)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"top_k": "many"}, {"do_sample": True}, r"_config\.json': top_k must be .*, got 'many'"),
        ({"do_sample": 1}, {}, r"do_sample must be true or false.*, got 1"),
        ({"eos_token_id": [1, "a"]}, {}, r"eos_token_id must be a list of whole.*, got \[1, 'a'\]"),
        ({"eos_token_id": 1.5}, {}, r"eos_token_id must be a whole number.*, got 1\.5"),
        (
            {"do_sample": True, "top_p": 7},
            {},
            r"json': SamplingConfig\.top_p must be above 0 and at most 1, got 7\.0",
        ),
        (
            {"max_new_tokens": 0},
            {"pad_token_id": 3},
            r"with \{'pad_token_id': 3\}: SamplingConfig\.max_new_tokens must be at least 1, got 0",
        ),
        ({"max_length": 5}, {"prompt_length": 5}, r"max_new_tokens must be at least 1.*, got 0"),
        ({}, {"top_q": 1}, r"top_q is not a field of SamplingConfig: did you mean 'top_"),
    ],
)
def test_values_that_cannot_be_are_named_with_their_file(tmp_path, fields, changes, message):
    with pytest.raises(ValueError, match=message):
        sampling_from_folder(written(tmp_path, **fields), **changes)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be a local folder, got '.*absent'"):
        sampling_from_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no generation_config\.json .* contains nothing"):
        sampling_from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1")
    with pytest.raises(ValueError, match="is not JSON"):
        sampling_from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must be a JSON object .* got a list"):
        sampling_from_folder(tmp_path)
