"""Convert records to arrays of fixed shapes: rows for fine-tuning, pairs of responses, and prompts for a model to answer."""

from effscale.rlhf.data.rows.batches import row_batches
from effscale.rlhf.data.rows.fine_tuning import fine_tuning_rows
from effscale.rlhf.data.rows.pairs import pair_rows
from effscale.rlhf.data.rows.prompts import prompt_rows

__all__ = [
    "fine_tuning_rows",
    "pair_rows",
    "prompt_rows",
    "row_batches",
]
