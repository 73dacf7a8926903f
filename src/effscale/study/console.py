"""Terminal output of an experiment while it prepares."""

import contextlib
import sys
from collections.abc import Callable, Iterator


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
