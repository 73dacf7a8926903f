import subprocess
import sys

import effscale.rlhf.data


def test_imports_are_quick():
    # Training does not need the data, and the data nothing that only some of its sources or templates need.
    slow = ("effscale.data", "effscale.rlhf.data")
    slower = ("jinja2", "pyarrow", "datasets", "grain", "torch", "transformers", "effscale.interop")
    code = (
        "import sys, effscale.rlhf\n"
        f"print([name for name in {slow} if name in sys.modules])\n"
        "import effscale.rlhf.data\n"
        f"print([name for name in {slower} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n"


def test_every_public_name_is_there():
    for name in effscale.rlhf.data.__all__:
        assert getattr(effscale.rlhf.data, name) is not None
