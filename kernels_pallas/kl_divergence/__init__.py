"""KL divergence of a student's distribution over a vocabulary from its teacher's, without whole logits."""

from kernels_pallas.kl_divergence.api import kl_divergence

__all__ = ["kl_divergence"]
