"""Run EleutherAI's lm-evaluation-harness on effscale models.

Use ``HarnessModel``, or ``python -m effscale.interop.harness`` on the command line.
"""

from effscale.interop.harness.model import HarnessModel

__all__ = ["HarnessModel"]
