"""What a command shows on the terminal: progress and tables."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence


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


def markdown(rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """Format a Markdown table with its first ``left`` columns left-aligned.

    Example:
        >>> print(markdown([["task", "by", "mean"], ["digits", "torch", "97.0"]]))
        | task | by | mean |
        |---|---|---:|
        | digits | torch | 97.0 |
    """
    rule = "|" + "---|" * left + "---:|" * (len(rows[0]) - left)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def titled(title: str, rows: Sequence[Sequence[str]], left: int) -> str:
    """Format a table of ``results.json`` with its title, in Markdown."""
    return f"{title}:\n\n{markdown(rows, left=left)}"


def show_rows(title: str, rows: Sequence[Sequence[str]], *, left: int = 2) -> None:
    """Print the table with its first ``left`` columns left-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i < left else "right")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
