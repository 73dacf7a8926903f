"""The toy model and data of ``toy_run.py`` as a fixture."""

import importlib.util
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "toy_run.py"


@pytest.fixture(scope="session")
def toy():
    spec = importlib.util.spec_from_file_location("effscale_toy_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy_script():
    return SCRIPT
