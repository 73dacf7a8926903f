"""Start-up of several processes that train one model."""

import dataclasses
import os
import re
from collections.abc import Mapping

import jax

from effscale.options import NonNegativeInt, Options, PositiveInt, check
from effscale.parallel.peers import watch_peers

VARIABLES = {
    "coordinator": "EFFSCALE_COORDINATOR",
    "num_processes": "EFFSCALE_NUM_PROCESSES",
    "process_id": "EFFSCALE_PROCESS_ID",
}
"""Environment variables that replace fields of ``DistributedConfig`` that are None."""

HEARTBEAT_VARIABLE = "EFFSCALE_HEARTBEAT_TIMEOUT"
"""The same for ``heartbeat_timeout``."""

HEARTBEAT_TIMEOUT = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig(Options):
    """How this process connects to the others. If empty, the cluster's environment decides, or the process runs alone."""

    coordinator: str | None = None
    """``host:port`` of process 0, reachable from every process."""
    num_processes: PositiveInt | None = None
    """Total number of processes."""
    process_id: NonNegativeInt | None = None
    """Number of this process, from 0."""
    cluster: str | None = None
    """Cluster type for JAX to query ("slurm", "ompi", "mpi4py", "k8s", ...); None: the detected one; "deactivate": none."""
    local_device_ids: tuple[int, ...] | None = None
    """Accelerators of this machine that this process uses; None: JAX's choice."""
    timeout: PositiveInt = 300
    """Seconds to wait for the other processes at start-up."""
    heartbeat_timeout: PositiveInt | None = None
    """Seconds without a heartbeat after which a process counts as lost and the others end; None: 30. Must be the same on all processes."""

    def __post_init__(self):
        super().__post_init__()
        place = self.coordinator is None or re.fullmatch(r".+:\d{1,5}", self.coordinator)
        check(self, bool(place), "coordinator", "host:port, such as 10.0.0.1:1234")
        if self.num_processes is not None and self.process_id is not None:
            wanted = f"0 to {self.num_processes - 1} with num_processes={self.num_processes}"
            check(self, self.process_id < self.num_processes, "process_id", wanted)


def initialize(config: DistributedConfig | None = None) -> bool:
    """Join the other processes of this run, if there are any. Call it before anything that uses a device.

    Settings are taken from, in this order: the fields of ``config``; the variables ``EFFSCALE_COORDINATOR``,
    ``EFFSCALE_NUM_PROCESSES``, ``EFFSCALE_PROCESS_ID`` and ``EFFSCALE_HEARTBEAT_TIMEOUT``; and what JAX detects in the environment
    of SLURM, Open MPI, Kubernetes (an indexed Job) or a TPU slice. A second call does nothing. To handle the loss of a process
    later, use ``ending_together``.

    Args:
        config: Explicit settings.

    Returns:
        Whether this process is one of several.

    Raises:
        ValueError: Only some of coordinator, num_processes and process_id are given.
        RuntimeError: Devices were used before, or the other processes cannot be reached (from JAX).
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    config = _with_environment(config or DistributedConfig(), os.environ)
    if config.num_processes == 1:
        return False
    given = [name for name in VARIABLES if getattr(config, name) is not None]
    if given and len(given) < len(VARIABLES):
        missing = [name for name in VARIABLES if name not in given]
        raise ValueError(
            f"{' and '.join(given)} given without {' and '.join(missing)}. Several processes need all three (fields of "
            f"DistributedConfig, or {', '.join(VARIABLES[name] for name in missing)}), or none under a scheduler "
            "that JAX supports"
        )
    timeouts = {
        "initialization_timeout": config.timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout or HEARTBEAT_TIMEOUT,
    }
    if given:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            local_device_ids=config.local_device_ids,
            cluster_detection_method="deactivate",
            **timeouts,
        )
        watch_peers()
        return True
    found = config.cluster or cluster_found(os.environ)
    if found in (None, "deactivate"):
        return False
    try:
        jax.distributed.initialize(
            local_device_ids=config.local_device_ids,
            cluster_detection_method=config.cluster,
            **timeouts,
        )
    except ValueError as error:
        if found == "TPU machine":
            return False
        raise RuntimeError(
            f"{found} seems to have started several processes, but JAX cannot determine how to reach them ({error}). "
            "Set coordinator, num_processes and process_id, or cluster='deactivate' to run a single process"
        ) from error
    watch_peers()
    return jax.process_count() > 1


def cluster_found(environment: Mapping[str, str]) -> str | None:
    """Return the kind of cluster that started this process as one of several, by its environment variables.

    It only decides whether to use JAX's own detection: a job with one task, or a shell inside an allocation, is a single
    process and needs no coordinator.

    >>> cluster_found({"OMPI_COMM_WORLD_SIZE": "4"})
    'Open MPI'
    """
    env = environment
    slurm_step = "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env
    if slurm_step and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if int(env.get("MEGASCALE_NUM_SLICES", "1")) > 1 or env.get("TPU_PROCESS_ADDRESSES_PATH"):
        return "TPU"
    if "," in (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")):
        return "TPU"
    # Importing JAX on a machine with TPU chips sets the first variable. Only the metadata server knows whether there are
    # other machines, and the second variable forbids asking it.
    if env.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in env:
        return "TPU machine"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return None


def _with_environment(
    config: DistributedConfig, environment: Mapping[str, str]
) -> DistributedConfig:
    variables = VARIABLES | {"heartbeat_timeout": HEARTBEAT_VARIABLE}
    texts = {name: environment.get(variable, "") for name, variable in variables.items()}
    for name in ("num_processes", "process_id", "heartbeat_timeout"):
        if texts[name] and not texts[name].isdecimal():
            raise ValueError(
                f"the environment variable {variables[name]} must be an integer, got {texts[name]!r}"
            )

    def number(name: str, own: int | None) -> int | None:
        return int(texts[name]) if own is None and texts[name] else own

    return dataclasses.replace(
        config,
        coordinator=config.coordinator or texts["coordinator"] or None,
        num_processes=number("num_processes", config.num_processes),
        process_id=number("process_id", config.process_id),
        heartbeat_timeout=number("heartbeat_timeout", config.heartbeat_timeout),
    )
