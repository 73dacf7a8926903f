"""Array functions with Pallas kernels for TPU and GPU and a jnp form everywhere else."""

from kernels_pallas.attention import attention
from kernels_pallas.cross_entropy import cross_entropy

__all__ = ["attention", "cross_entropy"]
