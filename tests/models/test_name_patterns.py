"""Patterns over names: each alternative counts."""

import pytest

from effscale.models.name_patterns import alternatives, name_search

NAMES = ["groups.0.query.bias", "groups.0.query.kernel.a", "groups.0.key.kernel.b", "heads.lm.bias"]


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("a", ["a"]),
        ("a|b.c|", ["a", "b.c", ""]),
        ("(a|b)|c", ["(a|b)", "c"]),
        (r"\||\(|c\\|d", [r"\|", r"\(", r"c\\", "d"]),
        ("[|(]|[]|]|[^]|]", ["[|(]", "[]|]", "[^]|]"]),
        ("(?i)A|(?P<n>b|(c|d))", ["(?i)A", "(?P<n>b|(c|d))"]),
    ],
)
def test_alternatives_are_cut_at_outer_bars_only(pattern, parts):
    assert alternatives(pattern) == parts


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        (r"\.[ab]$|^heads", [1, 2, 3]),
        ("(?i)QUERY|KEY", [0, 1, 2]),
        (r"(quer)y|(k)ey\.\w+\.b", [0, 1, 2]),
    ],
)
def test_a_pattern_chooses_as_re_search_does(pattern, chosen):
    search = name_search(pattern, NAMES, option="where")
    assert [i for i, name in enumerate(NAMES) if search(name)] == chosen


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lora|head", r"where='lora\|head': the alternative 'lora' matches no parameter; names are like: .*kernel\.a"),
        (r"query|kye\.kernel", r"the alternative .* matches no parameter; did you mean 'key'\?"),
        ("qeury", r"where='qeury' matches no parameter; did you mean 'query'\?"),
        ("(", r"where must be a regular expression, got '\(': missing \)"),
    ],
)  # fmt: skip
def test_an_alternative_that_matches_nothing_is_an_error(pattern, message):
    with pytest.raises(ValueError, match=message):
        name_search(pattern, NAMES, option="where")
