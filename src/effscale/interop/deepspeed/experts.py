"""Read and write DeepSpeed's expert files, for custom models, and write checkpoints that its engine loads."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped

from effscale.interop.deepspeed.expert_files import DeepSpeedMoE, expert_file, expert_tensor
from effscale.interop.folder import checked_folder
from effscale.interop.save import on_host, part
from effscale.interop.tensors import FolderError
from effscale.paths import local_path, output_folder

REST = "mp_rank_00_model_states.pt"
"""The file of everything except experts."""

Stacked: TypeAlias = Shaped[Array, "experts ..."] | Shaped[np.ndarray, "experts ..."]
Whole: TypeAlias = Shaped[Array, "..."] | Shaped[np.ndarray, "..."]


def read_deepspeed_experts(
    folder: str | os.PathLike[str],
) -> dict[str, dict[str, Shaped[np.ndarray, "experts ..."]]]:
    """Read the experts of a DeepSpeed checkpoint, stacked: one array for each parameter of the experts in a layer.

    Args:
        folder: The folder of one checkpoint, such as ``.../global_step1000``, or its parent, whose file ``latest`` names
            the checkpoint.

    Returns:
        For each layer with experts, in the order of the model and by the name of DeepSpeed's ``MoE`` module: the arrays
        ``[num_experts, ...]``, by their names in one expert. They have PyTorch's layout: ``nn.Linear.weight`` is ``(out, in)``.

    Raises:
        FolderError: A file is missing, damaged or not an expert file; or the experts of a layer differ in their parameters.
        ImportError: torch is not installed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> experts = {"block.moe": {"fc1.weight": np.zeros((4, 16, 8), np.float32)}}
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     write_deepspeed_experts(folder, experts)
        ...     read_deepspeed_experts(folder)["block.moe"]["fc1.weight"].shape
        (4, 16, 8)
    """
    tensors = DeepSpeedMoE(checked_folder(folder))
    found: dict[str, dict[str, np.ndarray]] = {}
    for prefix, count in tensors.experts.items():
        found[prefix] = {}
        for name in tensors.names_of(prefix):
            info = tensors.infos[expert_tensor(prefix, 0, name)]
            stacked = np.empty((count, *info.shape), info.dtype)
            for expert in range(count):
                stacked[expert] = tensors.read(expert_tensor(prefix, expert, name))
            found[prefix][name] = stacked
    return found


def read_deepspeed_rest(folder: str | os.PathLike[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read everything except the experts from a DeepSpeed checkpoint: routers, the dense part of residual layers, all other layers.

    Args:
        folder: As for ``read_deepspeed_experts``.

    Returns:
        The arrays by their names in the model. The router of a layer is ``NAME.deepspeed_moe.gate.wg.weight``,
        ``[num_experts, d_model]``. The dense part of a residual layer is ``NAME.mlp...``, and its two logits for each
        token ``NAME.coefficient``, that of the experts first.

    Raises:
        FolderError: As for ``read_deepspeed_experts``.
        ImportError: torch is not installed.
    """
    tensors = DeepSpeedMoE(checked_folder(folder))
    firsts = tuple(expert_tensor(prefix, 0, "").removesuffix("0.") for prefix in tensors.experts)
    names = [name for name in tensors.infos if not name.startswith(firsts)]
    # Copies, as the arrays read are views of the file.
    return {name: np.array(tensors.read(name)) for name in names}


def write_deepspeed_experts(
    folder: str | os.PathLike[str],
    experts: Mapping[str, Mapping[str, Stacked]],
    rest: Mapping[str, Whole] | None = None,
) -> None:
    """Write experts like DeepSpeed, one file for each; its engine loads them with any ``ep_size``.

    Args:
        folder: The folder of the checkpoint; it is created if needed. DeepSpeed uses its name as the ``tag`` of the checkpoint.
        experts: For each layer with experts, by the name of DeepSpeed's ``MoE`` module and in the order of
            ``model.named_modules()``: the arrays ``[num_experts, ...]`` with PyTorch's layout, by their names in one
            expert.
        rest: All other parameters and buffers of the model, by their names in its ``state_dict()``. With them the folder
            is a complete checkpoint for ``engine.load_checkpoint(parent, tag, load_module_only=True)``. Without them,
            DeepSpeed needs a ``mp_rank_00_model_states.pt`` from elsewhere.

    Raises:
        FolderError: The folder already contains experts, or the files cannot be written.
        ImportError: torch is not installed.
        ValueError: The arrays of a layer or a router in ``rest`` have different numbers of experts, or there are none.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> experts = {"moe": {"fc1.weight": jnp.ones((2, 16, 8)), "fc1.bias": jnp.zeros((2, 16))}}
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     write_deepspeed_experts(folder, experts)
        ...     sorted(os.listdir(folder))
        ['layer_0_expert_0_mp_rank_00_model_states.pt', 'layer_0_expert_1_mp_rank_00_model_states.pt']
    """
    counts = {prefix: _count(prefix, arrays) for prefix, arrays in experts.items()}
    for prefix, count in counts.items():
        gate = (rest or {}).get(f"{prefix}.deepspeed_moe.gate.wg.weight")
        if gate is not None and gate.shape[:1] != (count,):
            raise ValueError(
                f"the router of {prefix!r} must have {count} experts, got shape {tuple(gate.shape)}"
            )

    def files() -> Iterator[tuple[str, Any]]:
        for layer, (prefix, arrays) in enumerate(experts.items()):
            for expert in range(counts[prefix]):
                yield (
                    expert_file(layer, expert),
                    {
                        expert_tensor(prefix, expert, name): _of_expert(array, expert)
                        for name, array in arrays.items()
                    },
                )
        if rest is not None:
            module = {name: on_host(array) for name, array in rest.items()}
            yield REST, checkpoint(module, list(counts.values()))

    write_files(folder, files())


def _count(prefix: str, arrays: Mapping[str, Any]) -> int:
    counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        raise ValueError(
            f"the arrays of experts[{prefix!r}] must all have the number of experts as their first dimension, got shapes {shapes}"
        )
    return counts.pop()


def _of_expert(array: Any, expert: int) -> np.ndarray:
    return on_host(part(array, (expert,))) if isinstance(array, jax.Array) else array[expert]


def checkpoint(module: Any, num_experts: Sequence[int], **more: Any) -> dict[str, Any]:
    """Return the contents of that file, with what DeepSpeed's engine requires for a model that was not trained there."""
    return {
        "module": module,
        "num_experts": list(num_experts),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "lr_scheduler": None,
        "optimizer": None,
        **more,
    }


def write_files(folder: str | os.PathLike[str], files: Iterable[tuple[str, Any]]) -> None:
    """Write files of dicts of arrays and plain values, in the given order; all processes gather, process 0 writes."""
    place, first = local_path(folder), jax.process_index() == 0
    torch = _torch()
    try:
        output_folder(place)
        if first and DeepSpeedMoE.is_in(place):
            raise FolderError(
                f"{str(place)!r}: already contains expert files, and two models would be mixed. Use a new folder"
            )
        for name, content in files:
            if first:
                # A truncated file must not have a name that DeepSpeed looks for.
                temporary = place / f".{name}.part"
                torch.save(_as_torch(content), temporary)
                os.replace(temporary, place / name)
    except OSError as error:
        raise FolderError(f"{str(place)!r}: the checkpoint cannot be written: {error}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("write_deepspeed_experts")


def _as_torch(content: Any) -> Any:
    """Convert NumPy arrays to PyTorch tensors."""
    if isinstance(content, dict):
        return {name: _as_torch(value) for name, value in content.items()}
    if not isinstance(content, np.ndarray):
        return content
    torch = _torch()
    array = np.array(content, order="C")  # a copy, because torch saves the whole base of a view
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "writing DeepSpeed's files needs torch: install it with pip install torch"
        ) from error
    return torch
