"""A product of sorted rows in which each group of rows has its own matrix."""

from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
