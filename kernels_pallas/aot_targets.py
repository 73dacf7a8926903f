"""Machines that programs can be compiled for from a host that has none of them.

The compilers are the real ones: libtpu's for TPUs, and XLA:GPU with ptxas for the H100. So a program
that compiles here also compiles there, and its memory use is accurate. Compiling does not show whether
it computes the right numbers there, or how fast it is.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# What XLA:GPU would read from the driver, in the format of xla.GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of accelerator, and the number of devices."""

    name: str
    platform: str
    """"tpu" or "cuda"."""
    topology: str
    options: tuple[tuple[str, Any], ...] = ()

    def devices(self) -> Sequence[Any]:
        """Return device descriptions for a mesh or a sharding; arrays cannot be placed on them."""
        from jax.experimental import topologies

        name = {"topology_name": self.topology} if self.platform == "tpu" else {"topology_name": ""}
        options = dict(self.options)
        if self.platform == "cuda":
            options["topology"] = self.topology
        return topologies.get_topology_desc(platform=self.platform, **name, **options).devices

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that compiles for this target."""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        environment["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # libtpu's lock protects a chip. No chip is used here, and two compilations may run at the same time.
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        # The CUDA plugin loads libcupti by name at start-up.
        if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
            folders = [pathlib.Path(p) / "cu13" / "lib" for p in spec.submodule_search_locations]
            paths = [*map(str, folders), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        return environment


TARGETS = {
    target.name: target
    for target in (
        Target(name="v5e", platform="tpu", topology="v5e:2x4"),
        Target(name="v6e", platform="tpu", topology="v6e:2x4"),
        Target(name="v5p", platform="tpu", topology="v5p:2x2x2"),
        Target(name="v5p-64", platform="tpu", topology="v5p:4x4x4"),
        Target(name="v5p-512", platform="tpu", topology="v5p:8x8x8"),
        # partitions x hosts x devices per host
        Target(name="h100", platform="cuda", topology="1x1x8", options=(("target_config", _H100),)),
    )
}
