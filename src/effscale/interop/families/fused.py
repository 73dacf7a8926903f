"""Read fused experts, as transformers 5 has them in memory, under the names of single experts, as they are in files."""

import re
from collections.abc import Mapping
from typing import Any

from effscale.interop.tensors import FolderError, MixedTensors, TensorInfo

FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")


class Split:
    """Tensors in which ``experts.gate_up_proj`` ``[E, 2 f, d]`` and ``experts.down_proj`` ``[E, d, f]`` appear as 3 E matrices.

    Args:
        tensors: The tensors; if none of them is fused, they are unchanged.
        gate: The name of an expert's gate.
        up: The name of the layer that the gate multiplies.
        down: The name of the second layer.

    Raises:
        FolderError: An expert also exists separately.
    """

    def __init__(self, tensors: MixedTensors, *, gate: str, up: str, down: str):
        self._tensors = tensors
        self._parts: dict[str, tuple[str, int, slice]] = {}
        self._last: tuple[str, Any] = ("", None)
        infos: dict[str, TensorInfo] = {}
        for name, info in tensors.infos.items():
            match = FUSED.fullmatch(name)
            whole = (
                match is None or len(info.shape) != 3 or 0 in info.shape or info.form is not None
            )
            if whole or (match[2] == "gate_up_proj" and info.shape[1] % 2):
                infos[name] = info
                continue
            num, rows, width = info.shape
            parts = {down: slice(0, rows)}
            if match[2] == "gate_up_proj":
                parts = {gate: slice(0, rows // 2), up: slice(rows // 2, rows)}
            for part, where in parts.items():
                for expert in range(num):
                    own = f"{match[1]}.{expert}.{part}.weight"
                    if own in tensors.infos:
                        raise FolderError(
                            f"{name!r} contains {own!r}, which also exists separately"
                        )
                    infos[own] = TensorInfo((where.stop - where.start, width), info.dtype)
                    self._parts[own] = (name, expert, where)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Any:
        """Read one tensor; the fused tensor that contains it stays in memory until another is read."""
        if name not in self._parts:
            return self._tensors.read(name)
        fused, expert, where = self._parts[name]
        if self._last[0] != fused:
            self._last = (fused, self._tensors.read(fused))
        return self._last[1][expert, where]
