"""The kernels for TPUs."""
