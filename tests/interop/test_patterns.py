"""Regular expressions of adapters: the same answers as by `re`, as PEFT asks it, and no waiting."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from effscale.interop.patterns import MAX_LENGTH, MAX_NAME, matcher

PARTS = (
    *("a", "b", "1", "_", "-", ".", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^a.]", "[a-c_]"),
    *("a*", "b+", ".*", ".+?", r"\d+", "a?", "a{2}", "b{1,2}", "a{0,}", "[ab]{2,}"),
    *("^", "$", "|", "(a|b)", "(?:a|)", "(ab)?", "(?:a.*|b)??", "(a(b|1)?)"),
)
patterns = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
names = st.text("ab1._", max_size=8)


@given(patterns, names)
@example(r"layers\.(1|2)\.(self_attn|mlp)\..*_proj", "model.layers.2.mlp.up_proj")
@example("q_proj|v_proj", "model.layers.2.self_attn.v_proj")
@example("proj", "model.q_proj")
@example("^q_proj", "model.q_proj")
def test_answers_are_those_of_re(pattern, name):
    assert matcher(pattern)(name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


REFUSED = [
    *("(", ")", "a)", "*", "a**", "^*", "[", "[]", "[z-a]", "[a--b]", "a{", "a{3,2}", "a++", "\\"),
    *("(a+)+b", "(a|b){2}", "(?=a)", "(?<!a)b", "(?P<x>a)", r"(a)\1", r"\b", "(?i)a"),
    *("x" * (MAX_LENGTH + 1), ".*" * 5, "a?" * 30, "(?:" * 25 + "a" + ")?" * 25, "(.*|.+|a)" * 9),
]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_no_pattern_or_could_take_long_is_refused(pattern):
    with pytest.raises(ValueError, match=r".+"):
        matcher(pattern)


@pytest.mark.parametrize("pattern", ["^a*a*a*b", "^.*.*.*b", "a?" * 20 + "b", "(a|a)" * 20 + "b"])
def test_what_is_supported_is_answered_in_time(pattern):
    """Such patterns would take hours with one repetition more, or hundreds of parts."""
    assert not matcher(pattern)("a" * MAX_NAME)
    assert not matcher(r"(\d+\.)" * 8 + "b")("1" * MAX_NAME)
