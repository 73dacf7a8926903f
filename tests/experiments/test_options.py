"""Every numeric option of every experiment, given what cannot be."""

import dataclasses
import importlib
import math
import pkgutil

import pytest

import effscale.experiments
from effscale.training import AdamWConfig

NAMES = [module.name for module in pkgutil.iter_modules(effscale.experiments.__path__)]
MODULES = [importlib.import_module(f"effscale.experiments.{name}") for name in NAMES]
EXPERIMENTS = [module for module in MODULES if hasattr(module, "PRESETS")]


def numbers(config, path=()):
    """The paths of a config's numeric fields, and their values; those of the library's own AdamW are tested with it."""
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, AdamWConfig):
            yield from numbers(value, here)
        elif value is None and (kind := {"float", "int"} & set(str(field.type).split(" | "))):
            yield here, 0.0 if kind == {"float"} else 0
        elif type(value[0] if isinstance(value, tuple) and value else value) in (int, float):
            yield here, value


def put(config, path, value):
    inner = put(getattr(config, path[0]), path[1:], value) if len(path) > 1 else value
    return dataclasses.replace(config, **{path[0]: inner})


def refusal(config, path, value):
    try:
        put(config, path, value)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "module", EXPERIMENTS, ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_an_error_names_the_option_that_was_given(module):
    config = module.PRESETS["default"]
    paths = list(numbers(config))
    assert len(paths) > 5
    for path, old in paths:
        whole = isinstance(old[0] if isinstance(old, tuple) else old, int)
        for value in (0, -1) if whole else (0.0, -1.0, math.nan, math.inf):
            option = f"--{'.'.join(path)}={value}"
            message = refusal(config, path, (value,) if isinstance(old, tuple) else value)
            if message is not None:
                assert path[-1] in message.partition(":")[0], f"{option}: {message}"
            # -1 is what is left of the devices.
            impossible = not math.isfinite(value) or (whole and value < 0 and path[0] != "mesh")
            assert message is not None or not impossible, f"{option} is accepted"
