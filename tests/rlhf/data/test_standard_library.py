"""Pairs of the standard library: the same every time, and nothing on both sides."""

import ast

import pytest

from effscale.data.sources import standard_library as source
from effscale.rlhf.data import standard_library_pairs
from effscale.rlhf.data.standard_library import documented, first_sentence


@pytest.fixture(autouse=True, scope="module")
def a_part_of_the_library():
    """Every tenth file, and json, for the time; the whole is counted in a slow test."""
    files = source._files(source._root())
    some = sorted({*files[::10], "json/__init__.py", "json/decoder.py"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_files", lambda root: some)
        yield patch


def test_the_same_every_time_and_another_for_another_seed():
    first, again, other = (standard_library_pairs(seed) for seed in (0, 0, 1))
    assert first == again
    assert first.train != other.train
    assert {r.chosen for r in first.held_out} != {r.chosen for r in other.held_out}


def test_no_function_is_on_both_sides():
    parts = standard_library_pairs(held_out=0.3)
    texts = [{r.chosen for r in part} | {r.rejected for r in part} for part in parts]
    prompts = [{r.as_text() for r in part} for part in parts]
    assert all(len(part) > 20 for part in parts)
    for left, right in (texts, prompts):
        assert not left & right


def test_each_sentence_is_chosen_once_and_rejected_once():
    for part in standard_library_pairs(seed=2):
        chosen, rejected = [r.chosen for r in part], [r.rejected for r in part]
        assert sorted(chosen) == sorted(rejected)
        assert len(set(chosen)) == len(chosen)
        assert all(r.chosen != r.rejected for r in part)


def test_more_rejected_responses_for_each_function():
    once, thrice = (standard_library_pairs(rejected=n) for n in (1, 3))
    assert thrice.held_out == once.held_out
    assert thrice.train[: len(once.train)] == once.train
    chosen, rejected = ([getattr(r, n) for r in thrice.train] for n in ("chosen", "rejected"))
    assert sorted(chosen) == sorted(rejected) == sorted(3 * [r.chosen for r in once.train])
    assert len(set(thrice.train)) > 2.5 * len(once.train)
    assert all(r.chosen != r.rejected for r in thrice.train)


def test_what_is_said_is_what_the_library_says():
    import json

    found = {one.name: one for one in documented()}
    dumps = found["json.dumps"]
    assert dumps.summary == "Serialize ``obj`` to a JSON formatted ``str``."
    assert dumps.summary in " ".join(json.dumps.__doc__.split())
    assert dumps.signature.startswith("(obj, *, skipkeys=False, ensure_ascii=True")
    assert found["json.decoder.JSONDecoder.decode"].signature == "(s, _w=WHITESPACE.match)"
    decoder = found["json.decoder.JSONDecoder"]
    assert (dumps.kind, decoder.kind) == ("function", "class")
    assert decoder.signature.startswith("(*, object_hook=None")
    for one in found.values():
        ast.parse(f"def f{one.signature}: ...")
        assert not any(part.startswith("__") for part in one.name.split(".")[1:])


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.", "Return x."),
        ("Return x\nand y.  Then z.\n\nMore.", "Return x and y."),
        ("Files, i.e. names, ie. paths; etc. are kept! And so on.", "Files, i.e. names, ie. paths; etc. are kept!"),
        ("Version 3.11 of it", "Version 3.11 of it"),
        ("No stop here\n\nBut here.", "No stop here"),
        ("f(x) -> y\n\nReturn y.", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_first_sentences(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_shares_that_are_none():
    for held_out in (0.0, 1.0):
        with pytest.raises(
            ValueError, match=f"held_out must be above 0 and below 1, got {held_out}"
        ):
            standard_library_pairs(held_out=held_out)
    with pytest.raises(ValueError, match="rejected must be at least 1, got 0"):
        standard_library_pairs(rejected=0)
    with pytest.raises(
        ValueError, match=r"held_out must leave at least two .* which leaves \d in train"
    ):
        standard_library_pairs(held_out=0.99999)


@pytest.mark.slow
def test_the_whole_library(a_part_of_the_library):
    a_part_of_the_library.undo()
    pairs = standard_library_pairs()
    assert len(pairs.train) > 4000
    assert len(pairs.held_out) > 400
