"""Real preferences and instructions from the packages of ``make assets``, as records of RLHF."""

import json

from effscale.experiments.shared.assets import archive_file
from effscale.rlhf.data import Record, read_records

ARCHIVE = "llamafactory-0.9.5.tar.gz"


def preference_pairs() -> list[Record]:
    """300 English conversations with a preferred and another answer, both written by models and judged by one.

    The preferred answer is the longer one in 131 of them. The archive is under Apache-2.0 and says nothing of the texts, so read
    them and do not pass them on.

    Raises:
        MissingAssetError: The archive is not there; the message says how to get it.
    """
    return read_records(json.loads(archive_file(ARCHIVE, "data/dpo_en_demo.json")))


def instructions() -> list[Record]:
    """999 English instructions with one answer each, written by a model; as for ``preference_pairs``, do not pass them on.

    Raises:
        MissingAssetError: The archive is not there; the message says how to get it.
    """
    return read_records(json.loads(archive_file(ARCHIVE, "data/alpaca_en_demo.json")))
