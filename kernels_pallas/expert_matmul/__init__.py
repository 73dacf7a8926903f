"""The products before and after the hidden layer of experts: rows gathered from unsorted tokens, and weighted sums per token."""

from kernels_pallas.expert_matmul.api import gather_matmul, matmul_scatter, sort_rows

__all__ = ["gather_matmul", "matmul_scatter", "sort_rows"]
