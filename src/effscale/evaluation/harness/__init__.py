"""Run EleutherAI's lm-evaluation-harness on effscale models.

Use ``HarnessModel``, or ``python -m effscale.evaluation.harness`` on the command line.
"""

from effscale.evaluation.harness.model import HarnessModel

__all__ = ["HarnessModel"]
