"""DeepSpeed's JSON configurations, and its checkpoints of experts."""
