"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import effscale.parallel

MODULES = [module.name for module in pkgutil.iter_modules(effscale.parallel.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"effscale.parallel.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"effscale.parallel.{name}") for name in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 10
