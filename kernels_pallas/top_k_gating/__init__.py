"""The router's choice in one op: probabilities, the k experts of each token, and its position within each of them."""

from kernels_pallas.top_k_gating.api import top_k_gating
from kernels_pallas.top_k_gating.reference import Gating

__all__ = ["Gating", "top_k_gating"]
