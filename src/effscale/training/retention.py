"""Which checkpoints of a run to keep, and which one to return to."""

from effscale.training.checkpoint_files import finished_steps, read_run, step_folder
from effscale.training.storage import AnyPath


def superseded(folder: AnyPath, keep: int) -> list[int]:
    """Return the steps of the checkpoints that can be deleted.

    The newest ``keep`` checkpoints saved right after an update are kept, and the newest of all. While consecutive updates are
    skipped the model does not change, so checkpoints from that time never replace those from before it.
    """
    good, skipping = _by_kind(folder)
    newest = max(good + skipping, default=None)
    kept = {*good[-keep:], newest}
    return [step for step in sorted(good + skipping) if step not in kept]


def last_good(folder: AnyPath) -> int | None:
    """Return the step of the newest checkpoint that was saved right after an update, not while updates were being skipped."""
    good, _ = _by_kind(folder)
    return good[-1] if good else None


def _by_kind(folder: AnyPath) -> tuple[list[int], list[int]]:
    """Return the steps saved right after an update, and those saved while updates were being skipped, without unreadable checkpoints."""
    good: list[int] = []
    skipping: list[int] = []
    for step in finished_steps(folder):
        try:
            skipped = read_run(step_folder(folder, step)).get("skipped_in_row", 0)
        except (OSError, ValueError):
            continue
        (skipping if skipped else good).append(step)
    return good, skipping
