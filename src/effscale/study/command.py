"""The command line of a study."""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effscale.command.folder import Result, check_folder, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.study.folder import FREE, report
from effscale.study.study import Study


def main(
    presets: Mapping[str, Any],
    make: Callable[[Any], Study],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run the command line of a study; see ``--help``.

    Args:
        presets: As for ``parse``.
        make: As for ``conduct``.
        description: As for ``parse``.
        argv: As for ``parse``.
    """
    spec = sys.modules[make.__module__].__spec__  # its name is that of the module even in __main__
    name = None if spec is None else f"python -m {spec.name}"
    with messages():
        config = parse(presets, description, argv, name=name)
        keep_freed_memory()
        conduct(config, make)


def _selected(make: Callable[[Any], Study], config: Any) -> Study:
    return make(config).only(config.arms)


def conduct(config: Any, make: Callable[[Any], Study]) -> Result:
    """Make a study according to a config and fill its run folder.

    Args:
        config: A config with the fields of ``StudyPart``.
        make: A function of a module that creates the study of a config, and prepares its data.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the data; or ``resume`` is set and the folder has
            another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    began = time.perf_counter()
    check_folder(config, FREE)  # before the data is prepared and anything is written
    study = _selected(make, config)
    folder = open_folder(config, study.name, study.data)
    with resumable(folder):
        options = {"seeds": config.seeds, "jobs": config.jobs}
        again = functools.partial(_selected, make, config)
        results = study.train(folder.path, again=again, **options)
        return report(results, folder, began=began)
