"""Prompts, responses and preferences: from public datasets to the arrays for each phase of RLHF."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.rlhf.data.chat import ChatTemplate, TemplateError
    from effscale.rlhf.data.encoder import RecordEncoder
    from effscale.rlhf.data.formats import named_fields
    from effscale.rlhf.data.phases import Blend, phase_split, split_by_prompt
    from effscale.rlhf.data.read import read_records
    from effscale.rlhf.data.record import Message, Record, RecordError, RecordReport
    from effscale.rlhf.data.rows import (
        fine_tuning_rows,
        pair_rows,
        prompt_rows,
        row_batches,
    )
    from effscale.rlhf.data.standard_library import standard_library_pairs
    from effscale.rlhf.data.templates import read_tasks

__all__ = [
    "Blend",
    "ChatTemplate",
    "Message",
    "Record",
    "RecordEncoder",
    "RecordError",
    "RecordReport",
    "TemplateError",
    "fine_tuning_rows",
    "named_fields",
    "pair_rows",
    "phase_split",
    "prompt_rows",
    "read_records",
    "read_tasks",
    "row_batches",
    "split_by_prompt",
    "standard_library_pairs",
]

lazy_package(__name__)
