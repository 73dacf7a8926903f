"""Softmax attention that avoids holding all scores on hardware with a suitable kernel."""

from kernels_pallas.attention.api import Alibi, attention

__all__ = ["Alibi", "attention"]
