"""Real preferences and instructions from the packages of ``make assets``, as RLHF records."""

import json

from effscale.experiments.shared.assets import archive_file
from effscale.rlhf.data import Record, read_records

ARCHIVE = "llamafactory-0.9.5.tar.gz"


def preference_pairs() -> list[Record]:
    """Return 300 English conversations with a preferred and another answer, both written by models and judged by a
    model.

    The preferred answer is the longer one in 131 of them. The archive is under Apache-2.0 but does not mention the
    texts, so do not redistribute them.

    Raises:
        MissingAssetError: The archive is missing; the message says how to get it.
    """
    return read_records(json.loads(archive_file(ARCHIVE, "data/dpo_en_demo.json")))


def instructions() -> list[Record]:
    """Return 999 English instructions with one answer each, written by a model; as for ``preference_pairs``, do not redistribute them.

    Raises:
        MissingAssetError: The archive is missing; the message says how to get it.
    """
    return read_records(json.loads(archive_file(ARCHIVE, "data/alpaca_en_demo.json")))
