"""Meshes, rules that map logical axis names to mesh axes, placement of trees and batches, and process start-up.

Model code names no mesh axes. It names logical axes (``"embed"``, ``"mlp"``, ``"batch"``, ...), and one table of rules maps
these to mesh axes.
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.parallel.collectives import collectives
    from effscale.parallel.expert_exchange import Exchange, ragged_all_to_all
    from effscale.parallel.mesh import MeshConfig
    from effscale.parallel.peers import ending_together
    from effscale.parallel.placement import (
        batch_shard,
        batch_sharding,
        shard,
        shard_batch,
        shardings,
        to_host_memory,
    )
    from effscale.parallel.rules import DEFAULT_RULES, constrain, use_rules
    from effscale.parallel.startup import DistributedConfig, initialize
    from effscale.parallel.worker_steps import per_worker, simulate_workers
    from effscale.parallel.workers import (
        MovesParams,
        PerWorker,
        SendsBytes,
        resize_workers,
        sent_bytes,
        stack_workers,
        unstack_workers,
        worker_params,
        worker_specs,
    )

__all__ = [
    "DEFAULT_RULES",
    "DistributedConfig",
    "Exchange",
    "MeshConfig",
    "MovesParams",
    "PerWorker",
    "SendsBytes",
    "batch_shard",
    "batch_sharding",
    "collectives",
    "constrain",
    "ending_together",
    "initialize",
    "per_worker",
    "ragged_all_to_all",
    "resize_workers",
    "sent_bytes",
    "shard",
    "shard_batch",
    "shardings",
    "simulate_workers",
    "stack_workers",
    "to_host_memory",
    "unstack_workers",
    "use_rules",
    "worker_params",
    "worker_specs",
]

lazy_package(__name__)
