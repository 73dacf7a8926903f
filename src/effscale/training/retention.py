"""Which checkpoints of a run are kept, and which one is good to go back to."""

from effscale.training.checkpoint_files import finished_steps, read_run, step_folder
from effscale.training.storage import AnyPath


def superseded(folder: AnyPath, keep: int) -> list[int]:
    """Steps of the checkpoints that can be deleted.

    Kept are the newest ``keep`` that were saved right after an update, and the newest of all. While updates are being
    skipped one after another nothing is learned, so saves of that time never push out those from before it.
    """
    good, skipping = _by_kind(folder)
    newest = max(good + skipping, default=None)
    kept = {*good[-keep:], newest}
    return [step for step in sorted(good + skipping) if step not in kept]


def last_good(folder: AnyPath) -> int | None:
    """Step of the newest checkpoint that was saved right after an update and not amid skipped ones."""
    good, _ = _by_kind(folder)
    return good[-1] if good else None


def _by_kind(folder: AnyPath) -> tuple[list[int], list[int]]:
    """Steps saved right after an update, and steps saved amid skipped ones; what cannot be read is neither."""
    good: list[int] = []
    skipping: list[int] = []
    for step in finished_steps(folder):
        try:
            skipped = read_run(step_folder(folder, step)).get("skipped_in_row", 0)
        except (OSError, ValueError):
            continue
        (skipping if skipped else good).append(step)
    return good, skipping
