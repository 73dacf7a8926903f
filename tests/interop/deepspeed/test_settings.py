"""The one reader of DeepSpeed's configurations, over every row of every table."""

import copy
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from effscale.interop.deepspeed import compression, curriculum, optimizer, random_ltd, settings
from effscale.interop.deepspeed.settings import Key, read

TABLES = {
    "data_efficiency": settings.DATA_EFFICIENCY,
    "random_ltd": random_ltd.RANDOM_LTD,
    "curriculum_learning": curriculum.OLDER,
    "metric": curriculum.METRIC,
    "learning": curriculum.LEARNING,
    "layer_reduction": compression.LAYER_REDUCTION,
    "group": compression.GROUP,
    "config": optimizer._CONFIG,
    **curriculum.SCHEDULES,
    **{name: technique.shared for name, technique in compression.TECHNIQUES.items()},
    **{f"{name}.params": each.params for name, each in compression.TECHNIQUES.items()},
    **{name: optimizer._SHARED | own for name, (_, own) in optimizer._KINDS.items()},
}


def valid(kind):
    """A value of a kind, as JSON has it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, Mapping):
        return {name: valid(key.kind) for name, key in kind.items()}
    if origin is tuple:
        return [valid(one) for one in inner if one is not ...]
    if origin is Literal:
        return inner[0]
    if origin in (typing.Annotated, types.UnionType):
        return valid(inner[0])
    return {int: 3.0, float: 0.5, bool: True, str: "text", Any: [1]}[kind]


def rows(table, *above):
    for name, key in table.items():
        yield (*above, name), key
        if isinstance(key.kind, Mapping):
            yield from rows(key.kind, *above, name)


def changed(block, path, change):
    block = copy.deepcopy(block)
    *above, last = path
    place = block
    for name in above:
        place = place[name]
    change(place, last)
    return block


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_read_refused_and_missed_by_its_path(name):
    table = TABLES[name]
    whole = valid(table)
    assert read(whole, name, table).keys() == table.keys()
    for path, key in rows(table):
        where = ".".join((name, *path))
        wrong = 7 if isinstance(key.kind, Mapping) else {"no": "value"}
        given = changed(whole, path, lambda block, last, wrong=wrong: block.update({last: wrong}))
        if key.kind is Any:
            read(given, name, table)
        else:
            message = rf"^{re.escape(where)} must be .*, got {re.escape(repr(wrong))}"
            with pytest.raises(ValueError, match=message):
                read(given, name, table)
        without = changed(whole, path, lambda block, last: block.pop(last))
        if key.default is ...:
            with pytest.raises(ValueError, match=rf"needs {path[-1]}$"):
                read(without, name, table)
        else:
            read(without, name, table)
        beside = changed(whole, path, lambda block, last: block.update({f"{last}s": 1}))
        with pytest.raises(ValueError, match=rf"unknown key '{path[-1]}s': did you mean"):
            read(beside, name, table)
        with pytest.raises(ValueError, match="must be an object of keys and values, got"):
            read([], name, table)


def test_numbers_and_defaults():
    table = {"steps": Key(int), "rate": Key(float, 0.1), "more": Key({"on": Key(bool, False)}, {})}
    assert read({"steps": 1e5}, "", table) == {"steps": 100_000, "rate": 0.1, "more": {"on": False}}
    for value in (1.5, True, "1", float("inf"), float("nan"), None):
        with pytest.raises(ValueError, match=r"^steps must be an integer, got "):
            read({"steps": value}, "", table)
    advised = {"mode": Key(Literal["a"], "a", "Use another")}
    with pytest.raises(ValueError, match=r"must be one of 'a', got 'b'.*\. Use another$"):
        read({"mode": "b"}, "", advised)
    with pytest.raises(ValueError, match="the configuration: needs steps"):
        read({"other": 1}, "", table, others=True)
