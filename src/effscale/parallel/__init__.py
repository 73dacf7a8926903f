"""Meshes, rules that map logical axis names to mesh axes, placement of trees and batches, and process start-up.

Model code names no mesh axes. It names logical axes (``"embed"``, ``"mlp"``, ``"batch"``, ...), and one table of rules maps
these to mesh axes.
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.parallel.collectives import Collective, collectives
    from effscale.parallel.constraint import auto_batch_axes, constrain
    from effscale.parallel.expert_exchange import (
        Exchange,
        check_experts,
        expert_axes,
        mesh_size,
        to_experts,
        to_tokens,
    )
    from effscale.parallel.host_memory import on_devices, to_host_memory
    from effscale.parallel.mesh import AXES, MeshConfig
    from effscale.parallel.peers import collect_on_first, ending_together, on_first
    from effscale.parallel.placement import (
        BatchShard,
        batch_shard,
        batch_sharding,
        shard,
        shard_batch,
        shardings,
    )
    from effscale.parallel.ragged import ragged_all_to_all
    from effscale.parallel.rules import DEFAULT_RULES, Rules, current_rules, logical_spec, use_rules
    from effscale.parallel.startup import DistributedConfig, initialize
    from effscale.parallel.worker_specs import stack_workers, unstack_workers, worker_specs
    from effscale.parallel.worker_steps import per_worker, simulate_workers
    from effscale.parallel.workers import (
        MovesParams,
        PerWorker,
        SendsBytes,
        resize_workers,
        sent_bytes,
        worker_params,
    )

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "BatchShard",
    "Collective",
    "DistributedConfig",
    "Exchange",
    "MeshConfig",
    "MovesParams",
    "PerWorker",
    "Rules",
    "SendsBytes",
    "auto_batch_axes",
    "batch_shard",
    "batch_sharding",
    "check_experts",
    "collect_on_first",
    "collectives",
    "constrain",
    "current_rules",
    "ending_together",
    "expert_axes",
    "initialize",
    "logical_spec",
    "mesh_size",
    "on_devices",
    "on_first",
    "per_worker",
    "ragged_all_to_all",
    "resize_workers",
    "sent_bytes",
    "shard",
    "shard_batch",
    "shardings",
    "simulate_workers",
    "stack_workers",
    "to_experts",
    "to_host_memory",
    "to_tokens",
    "unstack_workers",
    "use_rules",
    "worker_params",
    "worker_specs",
]

lazy_package(__name__)
