"""Megatron-DeepSpeed's checkpoints: BLOOM's layer files, and GPTs with experts."""
