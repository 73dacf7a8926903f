"""The oracle lies beside the tests, and several import it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
