"""Write checkpoints that DeepSpeed's engine loads."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from effscale.interop.deepspeed.expert_files import DeepSpeedMoE
from effscale.interop.tensors import FolderError
from effscale.paths import local_path, output_folder

REST = "mp_rank_00_model_states.pt"
"""The file of everything except experts."""


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
