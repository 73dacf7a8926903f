"""Puts what a run measured into its page of the lab book.

    python -m effscale.experiments.lab_book runs/quickstart/20260101-120000 experiments/quickstart

Copies the run's figures beside the page and writes its table, machine and versions between the page's two marks; the
rest of the page is written by hand.
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from effscale.experiments.cli import messages
from effscale.training.serialize import write_atomic

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MAX_FIGURE_BYTES = 100_000


def fill(run: pathlib.Path, page: pathlib.Path) -> None:
    """Copies figures and writes the measured part of ``page / "README.md"``.

    Args:
        run: A finished run folder.
        page: A folder of the lab book.

    Raises:
        FileNotFoundError: If the run has no ``results.json`` or there is no page.
        ValueError: If the page lacks the marks, or a figure is too large to be kept in the repository.
    """
    for file in (run / "results.json", page / "README.md"):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; a finished run and a page are needed")
    text = (page / "README.md").read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page / 'README.md'} needs the lines {BEGIN} and {END}")
    for figure in sorted((run / "figures").glob("*.png")):
        if figure.stat().st_size > MAX_FIGURE_BYTES:
            raise ValueError(f"{figure} has more than {MAX_FIGURE_BYTES:,} bytes; draw it smaller")
        shutil.copyfile(figure, page / figure.name)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    write_atomic(page / "README.md", f"{head}{BEGIN}\n{measured(results, config)}\n{END}{tail}")


def measured(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The table of results with the machine and the versions, in Markdown.

    Example:
        >>> machine = {"platform": "Linux-x86_64", "cpu_count": 2}
        >>> devices = {"kind": "cpu", "count": 1, "processes": 1}
        >>> config = {"machine": machine, "devices": devices, "versions": {"jax": "0.10.2"}}
        >>> print(measured({"val_loss": 3.99243, "folder": "runs/x"}, config))
        | figure | value |
        |---|---:|
        | val_loss | 3.992 |
        <BLANKLINE>
        Machine: CPU cores 2; devices 1 x cpu; processes 1. Versions: jax 0.10.2.
    """
    rows = [
        f"| {name} | {_shown(value)} |"
        for name, value in results.items()
        if isinstance(value, int | float)
    ]
    devices, versions = config["devices"], config["versions"]
    return (
        "| figure | value |\n|---|---:|\n"
        + "\n".join(rows)
        + f"\n\nMachine: CPU cores {config['machine']['cpu_count']}; devices {devices['count']} x {devices['kind']}; "
        f"processes {devices['processes']}. Versions: {', '.join(f'{name} {version}' for name, version in versions.items() if version)}."
    )


def _shown(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m effscale.experiments.lab_book", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("page", type=pathlib.Path, help="folder of the lab book, with a README.md")
    arguments = parser.parse_args(argv)
    with messages():
        fill(arguments.run, arguments.page)


if __name__ == "__main__":
    main()
