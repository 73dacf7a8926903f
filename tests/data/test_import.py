import subprocess
import sys

import pytest

import effscale.data


def test_the_import_brings_nothing_slow():
    heavy = ("jax", "grain", "pyarrow", "datasets", "pydoc_data.topics")
    code = (
        "import sys, effscale.data\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "effscale.data.make_dataset\n"
        "print('grain' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def test_every_public_name_is_there_and_no_other():
    for name in effscale.data.__all__:
        assert getattr(effscale.data, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'make_dateset'"):
        _ = effscale.data.make_dateset
