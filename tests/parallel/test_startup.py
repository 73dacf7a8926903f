import jax
import pytest

from effscale.parallel import DistributedConfig, initialize
from effscale.parallel.startup import VARIABLES, cluster_found

SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The calls of `jax.distributed.initialize`, in an environment that names no cluster."""
    found = []
    for name in (
        *VARIABLES.values(),
        *SLURM,
        "OMPI_COMM_WORLD_SIZE",
        "MEGASCALE_NUM_SLICES",
        "TPU_PROCESS_ADDRESSES_PATH",
        "TPU_PROCESS_ADDRESSES",
        "TPU_WORKER_HOSTNAMES",
        "TPU_ML_PLATFORM",
        "JOB_COMPLETION_INDEX",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: found.append((a, k)))
    return found


def test_one_process_needs_nothing(calls):
    assert initialize() is False
    assert initialize(DistributedConfig(num_processes=1)) is False
    assert initialize(DistributedConfig(cluster="deactivate")) is False
    assert calls == []


def test_explicit_flags(calls):
    config = DistributedConfig(
        coordinator="10.0.0.1:1234", num_processes=2, process_id=1, timeout=7
    )
    assert initialize(config) is True
    ((args, kwargs),) = calls
    assert args == ("10.0.0.1:1234", 2, 1)
    assert kwargs["cluster_detection_method"] == "deactivate"
    assert kwargs["initialization_timeout"] == 7
    assert kwargs["heartbeat_timeout_seconds"] == 30


def test_the_environment_stands_in_and_flags_win(calls, monkeypatch):
    monkeypatch.setenv("EFFSCALE_COORDINATOR", "host:1")
    monkeypatch.setenv("EFFSCALE_NUM_PROCESSES", "4")
    monkeypatch.setenv("EFFSCALE_PROCESS_ID", "3")
    monkeypatch.setenv("EFFSCALE_HEARTBEAT_TIMEOUT", "12")
    initialize()
    initialize(DistributedConfig(process_id=0, heartbeat_timeout=5))
    assert [args for args, _ in calls] == [("host:1", 4, 3), ("host:1", 4, 0)]
    assert [kwargs["heartbeat_timeout_seconds"] for _, kwargs in calls] == [12, 5]


def test_a_part_of_the_flags():
    with pytest.raises(
        ValueError,
        match=r"coordinator given without num_processes and process_id\. .*EFFSCALE_NUM_PROCESSES, EFFSCALE_PROCESS_ID",
    ):
        initialize(DistributedConfig(coordinator="host:1"))


def test_a_variable_that_is_no_number(monkeypatch):
    monkeypatch.setenv("EFFSCALE_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="EFFSCALE_NUM_PROCESSES must be an integer, got 'two'"):
        initialize()


def test_a_process_id_of_the_environment_out_of_range(monkeypatch):
    monkeypatch.setenv("EFFSCALE_PROCESS_ID", "2")
    with pytest.raises(ValueError, match=r"process_id must be 0 to 1 with num_processes=2, got 2"):
        initialize(DistributedConfig(coordinator="host:1", num_processes=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host"}, "coordinator must be host:port, .*, got 'host'"),
        ({"num_processes": 0}, "num_processes must be at least 1, or None, got 0"),
        ({"process_id": -1}, "process_id must be at least 0, or None, got -1"),
        (
            {"process_id": 2, "num_processes": 2},
            "process_id must be 0 to 1 with num_processes=2, got 2",
        ),
        ({"timeout": 0}, "timeout must be at least 1, got 0"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout must be at least 1, or None, got 0"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "TPU"),
        ({"TPU_ML_PLATFORM": "JAX"}, "TPU machine"),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_clusters(environment, cluster):
    assert cluster_found(environment) == cluster


def test_a_cluster_is_left_to_jax(calls, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialize()
    initialize(DistributedConfig(cluster="mpi4py"))
    assert [(a, k["cluster_detection_method"]) for a, k in calls] == [((), None), ((), "mpi4py")]


def test_a_cluster_that_jax_cannot_use(monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"Open MPI seems .* Set coordinator, num_processes and process_id"
    ):
        initialize()


def test_a_second_call_does_nothing(calls, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    initialize(DistributedConfig(coordinator="host:1", num_processes=2, process_id=0))
    assert calls == []
