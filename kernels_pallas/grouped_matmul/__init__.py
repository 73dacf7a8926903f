"""A product of sorted rows, in which each group of rows has a matrix of its own."""

from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
