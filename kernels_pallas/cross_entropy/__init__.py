"""Linear layer, softmax and cross-entropy in one op that never holds all logits."""

from kernels_pallas.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
