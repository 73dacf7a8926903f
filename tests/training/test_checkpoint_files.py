import json

import pytest

from effscale.training.checkpoint_files import last_good, step_folder, superseded
from effscale.training.manifest import write_manifest


def saved(folder, skipped_in_row):
    """Checkpoints without arrays: step -> updates skipped in a row when it was saved (None: from before this was saved)."""
    for step, skipped in skipped_in_row.items():
        run = step_folder(folder, step) / "run" / "run.json"
        run.parent.mkdir(parents=True)
        run.write_text(json.dumps({} if skipped is None else {"skipped_in_row": skipped}))
        write_manifest(step_folder(folder, step))


@pytest.mark.parametrize(
    ("skipped_in_row", "keep", "deleted", "good"),
    [
        ({}, 1, [], None),
        ({3: 0, 6: 0, 9: 0}, 2, [3], 9),
        ({3: None, 6: None, 9: None}, 2, [3], 9),
        # Amid skipped updates only the newest is kept, beside all good ones.
        ({6: 0, 9: 0, 12: 0, 15: 3, 18: 6, 21: 9}, 3, [15, 18], 12),
        ({6: 0, 9: 1}, 1, [], 6),
        # They are over.
        ({6: 0, 9: 1, 12: 0}, 1, [6, 9], 12),
        # No update was ever made.
        ({3: 3, 6: 6}, 2, [3], None),
    ],
)
def test_what_is_kept(tmp_path, skipped_in_row, keep, deleted, good):
    saved(tmp_path, skipped_in_row)
    assert superseded(tmp_path, keep) == deleted
    assert last_good(tmp_path) == good


@pytest.mark.parametrize("content", ["", "[]"])
def test_what_cannot_be_read_is_neither_deleted_nor_good(tmp_path, content):
    saved(tmp_path, {3: 0, 6: 0, 9: 0})
    for step in (3, 9):
        (step_folder(tmp_path, step) / "run" / "run.json").write_text(content)
    assert superseded(tmp_path, 1) == []
    assert last_good(tmp_path) == 6
