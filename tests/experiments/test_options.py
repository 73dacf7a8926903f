"""What all experiments have alike: options that are checked, presets that are saved and read, a quick ``--help``."""

import dataclasses
import importlib
import json
import math
import pkgutil

import pytest

import effscale.experiments
from effscale.training import AdamWConfig
from effscale.training.saved import config_from_json
from effscale.training.serialize import to_json

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


of_every_experiment = pytest.mark.parametrize(
    "module", EXPERIMENTS, ids=lambda module: module.__name__.rpartition(".")[2]
)


@of_every_experiment
def test_every_preset_comes_back_from_json(module):
    for preset in module.PRESETS.values():
        assert config_from_json(type(preset), json.loads(json.dumps(to_json(preset)))) == preset


def test_help_is_quick_because_it_imports_little(start):
    """All in one process, in which none may import what only a run needs."""
    heavy = ("matplotlib", "orbax", "grain", "tensorboardX", "torch", "transformers")
    names = [module.__name__ for module in EXPERIMENTS]
    done = start(
        "-c",
        f"""
import importlib, sys
for name in {names}:
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as stop:
        print("status", stop.code, "of", name)
print("imported", [name for name in {heavy} if name in sys.modules])
""",
    )
    assert "imported []\n" in done.stdout, done.stderr
    for name in names:
        assert f"status 0 of {name}\n" in done.stdout
    assert "--reviews.epochs INT" in done.stdout
    assert "Number of passes over" in done.stdout


@of_every_experiment
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
