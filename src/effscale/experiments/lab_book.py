"""Write a run's results into its page of the lab book, and keep the numbers of all pages in line with the results.

    python -m effscale.experiments.lab_book runs/quickstart/20260101-120000 experiments/quickstart
    python -m effscale.experiments.lab_book

The first form copies the run's figures, ``results.json`` and ``config.json`` next to the page. Both forms then write the tables,
the machine and the versions between the two marks of each page, and update every marked number. A number is marked by the comment
that follows it, which names the experiment, the figure in its ``results.json`` and the format::

    a loss of 3.90<!-- data_efficiency ltd_100_val_loss .2f -->, for 39 %<!-- data_efficiency ltd_teraflops_saved .0% --> less

The format is Python's; one that ends in ``%`` leaves a space before the sign. Everything else on a page is written by hand.
"""

import argparse
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effscale.command.folder import OUTPUT
from effscale.command.line import messages
from effscale.command.terminal import titled
from effscale.options import did_you_mean
from effscale.training.serialize import write_atomic, write_json

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MARKED = re.compile(
    r"[-+\d.,]+(?: %)?(?P<mark><!-- (?P<experiment>\w+) (?P<name>\w+) (?P<format>\S+) -->)"
)
MAX_FIGURE_BYTES = 100_000

# The words for the figures of a run that has no tables.
WORDS = {
    "val_loss": "validation loss, nats per token",
    "unigram_entropy": "unigram entropy, nats per token",
    "train_loss": "training loss of the last 20 steps, nats per token",
    "tokens_seen": "training tokens",
    "tokens_per_second": "tokens per second, median over steps",
    "num_params": "parameters",
    "num_compilations": "compilations of the training step",
    "seconds": "seconds of the call",
    "peak_memory_mb": "peak memory of the process, MB",
}

# Entries of a run's config.json that describe the machine and not the question.
PRIVATE = (*OUTPUT, "cache")


def keep(run: pathlib.Path, page: pathlib.Path) -> None:
    """Copy a run's figures, ``results.json`` and ``config.json`` to ``page``, without the paths of the machine.

    Args:
        run: A finished run folder.
        page: A folder of the lab book.

    Raises:
        FileNotFoundError: The run has no ``results.json``, or the page does not exist.
        ValueError: A figure is too large for the repository.
    """
    for file in (run / "results.json", page / "README.md"):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist. Pass the folder of a finished run and that of its page."
            )
    for figure in sorted((run / "figures").glob("*.png")):
        if figure.stat().st_size > MAX_FIGURE_BYTES:
            raise ValueError(
                f"{figure} must have at most {MAX_FIGURE_BYTES:,} bytes, got {figure.stat().st_size:,}"
            )
        shutil.copyfile(figure, page / figure.name)
    results, config = _read(run / "results.json"), _read(run / "config.json")
    results.pop("folder", None)
    for name in PRIVATE:
        config["config"].pop(name, None)
    write_json(page / "results.json", results)
    write_json(page / "config.json", config)


def rendered(page: pathlib.Path, lab_book: pathlib.Path) -> str:
    """Fill the measured values into a page's text.

    Args:
        page: A Markdown file.
        lab_book: The folder of the experiments' pages and results.

    Raises:
        ValueError: A number is marked with a figure that does not exist.
    """
    text = page.read_text(encoding="utf-8")
    results = page.with_name("results.json")
    if results.is_file():
        head, begin, rest = text.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{page}: the lines {BEGIN} and {END} are missing")
        table = measured(_read(results), _read(page.with_name("config.json")))
        text = f"{head}{BEGIN}\n{table}\n{END}{tail}"

    def number(match: re.Match[str]) -> str:
        file = lab_book / match["experiment"] / "results.json"
        found = _read(file) if file.is_file() else {}
        if not isinstance(found.get(match["name"]), int | float):
            near = did_you_mean(match["name"], found)
            raise ValueError(f"{page}: {file} has no figure {match['name']!r}; {near}")
        return shown(found[match["name"]], match["format"]) + match["mark"]

    return MARKED.sub(number, text)


def measured(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Format a run's tables, or its named figures if it has no tables, with machine and versions, in Markdown.

    Example:
        >>> machine = {"platform": "Linux-x86_64", "cpu_count": 2}
        >>> devices = {"kind": "cpu", "count": 1, "processes": 1}
        >>> config = {"machine": machine, "devices": devices, "versions": {"jax": "0.10.2"}}
        >>> print(measured({"val_loss": 3.99243}, config))
        | figure | value |
        |---|---:|
        | validation loss, nats per token | 3.992 |
        <BLANKLINE>
        Machine: CPU cores 2; devices 1 x cpu; processes 1. Versions: jax 0.10.2.
    """
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float)}
    rows = [f"| {WORDS.get(name, name)} | {_number(value)} |" for name, value in numbers.items()]
    tables = [titled(**table) for table in results.get("tables", ())]
    tables = tables or ["\n".join(["| figure | value |", "|---|---:|", *rows])]
    devices, versions = config["devices"], config["versions"]
    machine = (
        f"Machine: CPU cores {config['machine']['cpu_count']}; devices {devices['count']} x {devices['kind']}; "
        f"processes {devices['processes']}. Versions: {', '.join(f'{name} {version}' for name, version in versions.items() if version)}."
    )
    return "\n\n".join([*tables, machine])


def shown(value: float | int, form: str) -> str:
    """Format a number for a page.

    >>> shown(0.3912, ".0%"), shown(3.9018, ".2f"), shown(-0.0214, "+.3f"), shown(819200, ",d")
    ('39 %', '3.90', '-0.021', '819,200')
    """
    return format(value, form).replace("%", " %")


def pages(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Iterate over the repository's pages that may contain marked numbers."""
    for pattern in ("*.md", "docs/*.md", "experiments/**/*.md"):
        yield from sorted(root.glob(pattern))


def _book(page: pathlib.Path) -> pathlib.Path:
    """Find the lab book of a page's folder; an experiment may have several pages, each in a folder below its first."""
    above = page.resolve().parents
    return next((folder for folder in above if folder.name == "experiments"), above[0])


def _read(file: pathlib.Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _number(value: float | int) -> str:
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m effscale.experiments.lab_book",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=pathlib.Path, nargs="?", help="folder of a finished run")
    parser.add_argument(
        "page", type=pathlib.Path, nargs="?", help="folder of the lab book, with a README.md"
    )
    arguments = parser.parse_args(argv)
    if arguments.run is not None and arguments.page is None:
        parser.error("a run needs the folder of its page")
    with messages():
        if arguments.run is not None:
            keep(arguments.run, arguments.page)
        book = pathlib.Path("experiments") if arguments.page is None else _book(arguments.page)
        if not book.is_dir():
            raise FileNotFoundError(
                f"{book.resolve()} does not exist. Call this in the root of the repository."
            )
        for page in pages(book.resolve().parent):
            text = rendered(page, book)
            if text != page.read_text(encoding="utf-8"):
                write_atomic(page, text)


if __name__ == "__main__":
    main()
