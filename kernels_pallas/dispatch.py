"""How every op chooses its implementation.

An op offers implementations by name. ``None`` requests the best one for the platform that the
program is lowered for, which may differ from the platform it is traced on: a CPU host can compile for
TPUs. So ``jax.lax.platform_dependent`` chooses between platforms, and each implementation reports in
advance, from only shapes and dtypes, whether it supports the operands.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

HOPPER_CAPABILITY = "9.0"
_SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")


class Unsupported(NotImplementedError):
    """An implementation was requested by name but does not support these operands here."""


def check_name(name: str | None, known: Iterable[str]) -> None:
    """Raise a ``ValueError`` with similar names unless ``name`` is None or known."""
    known = list(known)
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"implementation must be None or one of {known}, got {name!r}.{hint}")


def auto_partitioned() -> tuple[str, ...]:
    """Return the mesh axes that the compiler partitions over: none in a ``jax.shard_map`` over all of them.

    A Pallas kernel is opaque to the partitioner, so it can be used only if there are none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    manual = jax.sharding.AxisType.Manual
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = tuple(name for name, kind in pairs if kind != manual)
    # Inside a shard_map, JAX requires every axis to be manual before it lowers a kernel, including those of
    # size one.
    within = len(others) < len(mesh.axis_names)
    return tuple(name for name in others if within or mesh.shape[name] > 1)


def partitioned() -> str | None:
    """Return why no kernel can be used under the current mesh, or None."""
    if axes := auto_partitioned():
        return (
            f"the mesh axes {axes} are partitioned by the compiler, which cannot split a Pallas kernel; call it inside "
            "jax.shard_map over all of them"
        )
    return None


def small_vmem() -> str | None:
    """Return why kernels with large tiles cannot be used on the TPU of this process, or None; v5e and later have 64 MiB of VMEM or more."""
    kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""
    return f"{kind} has too little VMEM" if kind.startswith(_SMALL_VMEM) else None


def mesh_platform() -> str | None:
    """Return the platform of the current mesh (cpu, tpu or cuda), or None without a mesh: the target may be any platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    return "cuda" if device.platform == "gpu" else device.platform


def hopper_in_use() -> bool:
    """Return whether the GPU of the current mesh, or otherwise of this process, is a Hopper (H100, H200)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform in ("cuda", "gpu") and any(
            name in device.device_kind for name in ("H100", "H200")
        )
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")) == HOPPER_CAPABILITY


def accelerator() -> str | None:
    """Return "tpu" or "gpu", the implementations for the platform that programs are currently built for: that of the current
    mesh, or otherwise of this process. Return None for other platforms, so that an op is not traced for absent hardware.
    """
    if platform() == "tpu":
        return "tpu"
    return "gpu" if hopper_in_use() else None


def platform() -> str:
    """Return the platform that programs are currently built for: that of the current mesh, or otherwise of this process."""
    return mesh_platform() or jax.default_backend()


def by_implementation(
    op: str,
    name: str | None,
    functions: Mapping[str, Callable[[], Callable[..., Any]]],
    why_not: Callable[[str], str | None],
    operands: Iterable[Any],
    **options: Any,
) -> Any:
    """Run an op by a named implementation, or by the best one for the platform that the program is lowered for.

    Args:
        op: The name of the op, for errors.
        name: The name of an implementation, or None.
        functions: Imports and returns each implementation: "reference", and "tpu" and "gpu" if there are such kernels.
        why_not: Returns why the kernel of this name does not support the operands here, or None.
        operands: The arrays.
        options: Passed to the implementation by keyword.

    Raises:
        Unsupported: The named implementation does not support the operands here.
    """
    if name is not None and (reason := why_not(name)):
        raise Unsupported(f"{op}: implementation={name!r} is not supported here: {reason}.")
    chosen = {"default": name or "reference"}
    if name is None and "tpu" in functions and why_not("tpu") is None:
        chosen["tpu"] = "tpu"
    if name is None and "gpu" in functions and hopper_in_use() and why_not("gpu") is None:
        chosen["cuda"] = "gpu"
    parts = {
        platform: functools.partial(functions[name](), **options)
        for platform, name in chosen.items()
    }
    return by_platform(parts, *operands)


def by_platform(functions: Mapping[str, Callable[..., Any]], *operands: Any) -> Any:
    """Call ``functions[platform](*operands)`` for the platform of lowering, or ``"default"``."""
    functions = dict(functions)
    default = functions.pop("default")
    if not functions:
        return default(*operands)
    return jax.lax.platform_dependent(*operands, default=default, **functions)
