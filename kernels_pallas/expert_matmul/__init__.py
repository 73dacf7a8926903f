"""The products of experts on both sides of their hidden layer: rows taken from unsorted tokens, and weighted sums for each token."""

from kernels_pallas.expert_matmul.api import gather_matmul, matmul_scatter, sort_rows

__all__ = ["gather_matmul", "matmul_scatter", "sort_rows"]
