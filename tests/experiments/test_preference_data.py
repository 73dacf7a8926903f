import pytest

from effscale.experiments.shared.assets import MissingAssetError
from effscale.experiments.shared.preference_data import instructions, preference_pairs


def need(read):
    try:
        return read()
    except MissingAssetError as error:
        pytest.skip(str(error))


def test_preference_pairs():
    pairs = need(preference_pairs)
    assert len(pairs) == 300
    assert sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) == 131
    assert sum(len(pair.messages) > 1 for pair in pairs) == 186  # of several turns
    assert all(pair.messages[-1].role == "user" for pair in pairs)


def test_instructions():
    records = need(instructions)
    assert len(records) == 999
    assert all(record.rejected is None for record in records)
    assert records[0].as_text() == "Describe a process of making crepes."
