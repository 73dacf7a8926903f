"""Array functions with Pallas kernels for TPU and GPU, and plain jnp implementations for all other platforms."""

from kernels_pallas.attention import attention
from kernels_pallas.cross_entropy import cross_entropy
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.kl_divergence import kl_divergence
from kernels_pallas.packed_matmul import packed_matmul
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.top_k_gating import top_k_gating

__all__ = [
    "attention",
    "cross_entropy",
    "grouped_matmul",
    "kl_divergence",
    "packed_matmul",
    "quantized_matmul",
    "top_k_gating",
]
