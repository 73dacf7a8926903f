"""How every op chooses its implementation.

An op offers implementations by name. ``None`` asks for the best one for the platform that the
program is lowered for, which need not be the one it is traced on: a CPU host compiles for TPUs. So
the choice between platforms is left to ``jax.lax.platform_dependent``, and each implementation says
beforehand, from shapes and types alone, whether it can serve.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

HOPPER_CAPABILITY = "9.0"


class Unsupported(NotImplementedError):
    """An implementation was asked for by name and cannot serve these operands here."""


def check_name(name: str | None, known: Iterable[str]) -> None:
    """Raise a ``ValueError`` with the near names unless ``name`` is None or known."""
    known = list(known)
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"implementation={name!r} is not one of {known} or None.{hint}")


def auto_partitioned() -> tuple[str, ...]:
    """Mesh axes that the compiler partitions over: none in a ``jax.shard_map`` over all of them.

    A Pallas kernel is opaque to the partitioner, so it can serve only where there are none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    manual = jax.sharding.AxisType.Manual
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = tuple(name for name, kind in pairs if kind != manual)
    # Within a shard_map JAX wants every axis manual before it lowers a kernel, those of size one
    # too.
    within = len(others) < len(mesh.axis_names)
    return tuple(name for name in others if within or mesh.shape[name] > 1)


def mesh_platform() -> str | None:
    """The platform of the mesh in use: cpu, tpu or cuda. None without one: the program may be lowered for any."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    return "cuda" if device.platform == "gpu" else device.platform


def hopper_in_use() -> bool:
    """Whether the GPU of the mesh in use, or else of this process, is a Hopper (H100, H200)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform in ("cuda", "gpu") and any(
            name in device.device_kind for name in ("H100", "H200")
        )
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")) == HOPPER_CAPABILITY


def accelerator() -> str | None:
    """The name of the implementations, "tpu" or "gpu", that serve where programs are made for now: on the mesh in use, or else
    on this process's devices. None for others, where an op need not be traced for machines that are not there.
    """
    if platform() == "tpu":
        return "tpu"
    return "gpu" if hopper_in_use() else None


def platform() -> str:
    """The platform that programs are made for now: that of the mesh in use, or else of this process."""
    return mesh_platform() or jax.default_backend()


def by_platform(functions: Mapping[str, Callable[..., Any]], *operands: Any) -> Any:
    """Call ``functions[platform](*operands)`` for the platform of lowering, or ``"default"``."""
    functions = dict(functions)
    default = functions.pop("default")
    if not functions:
        return default(*operands)
    return jax.lax.platform_dependent(*operands, default=default, **functions)
