"""Softmax attention that never holds all scores, where the hardware has a kernel for it."""

from kernels_pallas.attention.api import Alibi, attention

__all__ = ["Alibi", "attention"]
