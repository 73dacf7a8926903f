"""Tests of the configs' check of their own fields."""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from effscale.options import Bounds, NonNegativeFloat, Options, PositiveInt, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Options):
    width: PositiveInt = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Options):
    steps: PositiveInt = 1
    rate: NonNegativeFloat = 0.0
    clip: Annotated[float, Bounds(above=0, at_most=1)] | None = None
    on: bool = True
    kind: Literal["linear", "cosine"] | None = "linear"
    sizes: tuple[PositiveInt, ...] = (1,)
    names: Annotated[tuple[str, ...], Bounds(at_least=1)] = ("a",)
    either: Literal["all"] | tuple[str, ...] = "all"
    inner: Inner = Inner()
    last: PositiveInt = 1

    def __post_init__(self):
        super().__post_init__()
        check(self, self.last <= self.steps, "last", f"at most steps={self.steps}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, r"Outer.steps must be at least 1, got 0"),
        ("steps", 2.5, r"Outer.steps must be an integer, got 2.5"),
        ("steps", True, r"Outer.steps must be an integer, got True"),
        ("steps", "3", r"Outer.steps must be an integer, got '3'"),
        ("steps", None, r"Outer.steps must be an integer, got None"),
        ("rate", -1, r"Outer.rate must be at least 0, got -1"),
        ("rate", math.nan, r"Outer.rate must be a finite number, got nan"),
        ("rate", 10**400, r"Outer.rate must be a finite number, got 1000"),
        ("rate", 1j, r"Outer.rate must be a finite number, got 1j"),
        ("rate", np.ones(2), r"Outer.rate must be a finite number, got array"),
        ("clip", 0, r"Outer.clip must be above 0 and at most 1, or None, got 0"),
        ("clip", math.inf, r"Outer.clip must be a finite number, or None, got inf"),
        ("on", "no", r"Outer.on must be True or False, got 'no'"),
        ("on", 1, r"Outer.on must be True or False, got 1"),
        (
            "kind",
            "cosin",
            r"one of 'linear', 'cosine', or None, got 'cosin'; did you mean 'cosine'\?",
        ),
        ("kind", ["linear"], r"one of 'linear', 'cosine', or None, got \['linear'\]"),
        ("sizes", (1, 0), r"Outer.sizes\[1\] must be at least 1, got 0"),
        ("sizes", 3, r"Outer.sizes must be a tuple, got 3"),
        ("names", (), r"Outer.names must be a tuple whose length is at least 1, got \(\)"),
        ("names", "abc", r"Outer.names must be a tuple, got 'abc'"),
        ("either", ("a", 1), r"Outer.either\[1\] must be a text, got 1"),
        ("either", "al", r"Outer.either must be one of 'all', got 'al'"),
        ("inner", {"width": 1}, r"Outer.inner must be of type Inner, got \{'width': 1\}"),
        ("last", 2, r"Outer.last must be at most steps=1, got 2"),
    ],
)
def test_refuses_other_types_and_values_out_of_bounds(field, value, message):
    with pytest.raises(ValueError, match=message):
        Outer(**{field: value})


def test_numbers_become_pythons_and_lists_tuples():
    made = Outer(steps=np.int64(3), rate=1, clip=np.float32(0.5), sizes=[np.int32(2)], either=["a"])
    assert [type(made.steps), type(made.rate), type(made.clip)] == [int, float, float]
    assert made.sizes == (2,)
    assert type(made.sizes[0]) is int
    assert hash(made) == hash(Outer(steps=3, rate=1.0, clip=0.5, sizes=(2,), either=("a",)))


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(at_least=0, at_most=1), "from 0 to 1"),
        (Bounds(at_least=0, below=1), "from 0 to below 1"),
        (Bounds(above=0, below=1), "between 0 and 1"),
        (Bounds(above=0, at_most=1), "above 0 and at most 1"),
        (Bounds(at_most=3), "at most 3"),
    ],
)
def test_bounds_are_said_as_they_hold(bounds, text):
    assert str(bounds) == text
    assert [bounds.hold(x) for x in (0, 1)] == {
        "from 0 to 1": [True, True],
        "from 0 to below 1": [True, False],
        "between 0 and 1": [False, False],
        "above 0 and at most 1": [False, True],
        "at most 3": [True, True],
    }[text]


PACKAGES = (
    "curriculum",
    "data",
    "data.cleaning",
    "generation",
    "ltd",
    "models",
    "moe",
    "optim",
    "parallel",
    "quant",
    "rlhf",
    "training",
)


def configs(below: type[Any] = Options) -> Iterator[type[Any]]:
    for config in below.__subclasses__():
        if config.__module__.startswith("effscale."):
            yield config
        yield from configs(config)


def test_every_config_checks_its_fields_before_it_compares_them(monkeypatch):
    """A config whose ``__post_init__`` forgets that of ``super()`` checks nothing."""
    for package in PACKAGES:
        importlib.import_module(f"effscale.{package}")

    def called(self):
        raise KeyError("called")

    monkeypatch.setattr(Options, "__post_init__", called)
    for config in (one for one in configs() if not inspect.isabstract(one)):
        with pytest.raises(KeyError, match="called"):
            object.__new__(config).__post_init__()
