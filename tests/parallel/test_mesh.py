import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from effscale.parallel import MeshConfig
from effscale.parallel.mesh import AXES, over_slices


def test_default_is_data_parallel_over_all_devices():
    mesh = MeshConfig().build()
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "expert": 4}, (2, 1, 4, 1)),
        ({"data": 1, "tensor": 8}, (1, 1, 1, 8)),
    ],
)
def test_sizes(sizes, expected):
    assert MeshConfig(**sizes).build().devices.shape == expected


def test_tensor_neighbours_are_adjacent_devices():
    devices = MeshConfig(tensor=2).build().devices
    assert [d.id for d in devices[0, 0, 0]] == [0, 1]


def test_a_subset_of_the_devices():
    assert MeshConfig().build(jax.devices()[:2]).size == 2
    assert MeshConfig(data=1, tensor=4).build(jax.devices()[:4]).shape["tensor"] == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, r"MeshConfig\.fsdp must be a positive integer, or -1 .*, got 0"),
        ({"tensor": -2}, r"MeshConfig\.tensor must be .*, got -2"),
        ({"fsdp": -1}, r"-1 for data and fsdp: at most one axis may be -1"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_devices_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"needs a multiple of 3 devices, but there are 8.* one of 1, 2, 4, 8"
    ):
        MeshConfig(fsdp=3).build()


def test_another_number_of_devices():
    with pytest.raises(
        ValueError,
        match=r"describes 4 devices, but there are 8\. Set data=-1 .* build\(devices=\.\.\.\)",
    ):
        MeshConfig(data=2, tensor=2).build()


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshConfig().data = 2
    with pytest.raises(TypeError):
        MeshConfig(8)


def gpus(hosts, per_host=8):
    """What a mesh asks of the GPUs of several hosts; JAX calls each host a slice."""
    return [
        types.SimpleNamespace(
            id=index, process_index=index // per_host, slice_index=index // per_host,
            platform="gpu", device_kind="NVIDIA H100",
        )
        for index in range(hosts * per_host)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 1, 1, 8), (1, 16, 1, 2), (2, 8, 1, 2)])
def test_the_first_axes_lie_across_slices_and_tensor_within_one(shape):
    """`jax.make_mesh` refuses devices of several slices."""
    placed = over_slices(shape, gpus(hosts=4))
    hosts = np.vectorize(lambda device: device.slice_index)(placed)
    assert placed.shape == shape
    assert (hosts == hosts[..., :1]).all()  # a step along tensor stays on its host
    assert (np.diff(hosts.reshape(-1, shape[-1])[:, 0]) >= 0).all()
    assert {device.id for device in placed.flat} == set(range(32))


def test_a_mesh_that_slices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"cannot be divided over 3 slices or hosts\. Make data"):
        over_slices((8, 1, 1, 4), gpus(hosts=3))
