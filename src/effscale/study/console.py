"""Terminal output of an experiment before and after training."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show that ``what`` is in progress, with a spinner on a terminal.

    Yields:
        A function that shows the progress.
    """
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(f"{what} ...")
        yield lambda detail: None
        return
    with console.status(f"{what} ...") as spinner:
        yield lambda detail: spinner.update(f"{what}: {detail}")


def show_results(title: str, result: Any, texts: Sequence[str] = ()) -> None:
    """Print samples, the table of a result's figures, and the run folder.

    Args:
        title: Title of the table.
        result: A dataclass whose last field is the folder.
        texts: Samples.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for text in texts:
        console.rule(style="dim")
        console.print(Text(text))
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("value", justify="right")
    values = dataclasses.asdict(result)
    folder = values.pop("folder")
    for name, value in values.items():
        table.add_row(
            name, f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else f"{value:,.0f}"
        )
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True)
