"""Meshes, the rules that map logical axis names to them, placement of trees and batches, process start-up.

A model file names no mesh axis: it names logical axes (``"embed"``, ``"mlp"``, ``"batch"``, ...), and one
table of rules says which mesh axes they lie on. Several processes on one machine:
``python -m effscale.parallel.local_launch``.
"""

from effscale.parallel.constraint import auto_batch_axes, constrain
from effscale.parallel.mesh import AXES, MeshConfig
from effscale.parallel.placement import (
    BatchShard,
    batch_shard,
    batch_sharding,
    shard,
    shard_batch,
    shardings,
)
from effscale.parallel.rules import DEFAULT_RULES, Rules, current_rules, logical_spec, use_rules
from effscale.parallel.startup import DistributedConfig, initialize

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "BatchShard",
    "DistributedConfig",
    "MeshConfig",
    "Rules",
    "auto_batch_axes",
    "batch_shard",
    "batch_sharding",
    "constrain",
    "current_rules",
    "initialize",
    "logical_spec",
    "shard",
    "shard_batch",
    "shardings",
    "use_rules",
]
