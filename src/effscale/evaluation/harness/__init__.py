"""EleutherAI's lm-evaluation-harness with models of this library: ``HarnessModel``; on the command line ``python -m effscale.evaluation.harness``."""

from effscale.evaluation.harness.model import HarnessModel

__all__ = ["HarnessModel"]
