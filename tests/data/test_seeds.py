import re

import numpy as np
import pytest

from effscale.data import Splits
from effscale.data.seeds import check_seed


@pytest.mark.parametrize("seed", [(), [], (1, 2), -1, 1.0, True, None, "1"], ids=repr)
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(
        ValueError, match=rf"seed must be an integer, 0 or above, got {re.escape(repr(seed))}"
    ):
        check_seed(seed)


def test_integers_are_seeds():
    check_seed(2**70)
    check_seed(np.uint32(3))
    with pytest.raises(ValueError, match=f"seed must be from 0 to {2**64 - 1}, got {2**64}"):
        Splits(seed=2**64)
