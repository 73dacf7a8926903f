"""DeepSpeed's ``mp_rank_XX_model_states.pt``: a model's state dict together with its training state."""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effscale.interop.files.torch import TorchFile

if TYPE_CHECKING:
    import torch

BYSTANDERS = re.compile(
    r"argparse\.Namespace|(deepspeed|megatron)\.[\w.]+"
    r"|numpy\.(ndarray|dtype|_?core\.multiarray\.(_reconstruct|scalar))"
)
"""Objects in such files other than tensors: Megatron's arguments, loss scalers, settings, a generator's state."""

KEPT = ("args", "checkpoint_version", "num_experts")
"""The other entries of a file that are kept."""

DEPTH = 8
"""Maximum nesting depth of a model's state dict; Megatron's has depth three."""

LOCAL = ".deepspeed_moe.experts.deepspeed_experts."
"""Part of the names of experts. In this file, they would be the experts of one process, under its own numbers."""


class Bystander:
    """A placeholder for an object that is not needed: it does nothing, and stores the attributes it is given."""

    values: Mapping[str, Any] = {}

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.values = dict(state)


class ModelStates(TorchFile):
    """The flat state dict under ``module``; see ``effscale.interop.files.torch.TorchFile``.

    Megatron's is a nested dict, whose keys are joined by dots to form the names of the parameters.

    The file also contains objects of DeepSpeed's and Megatron's own classes. The restricted unpickler replaces each by a
    ``Bystander`` instead of importing its class; an object of any other class is rejected, as in every file.

    Attributes:
        fields: Other information about the model: the entries in ``KEPT`` that the file has.

    Raises:
        ImportError: torch is not installed.
        FolderError: The file cannot be read, or has no state dict under ``module``.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.fields: Mapping[str, Any] = {}
        super().__init__(path)

    def _content(self) -> Any:
        import torch

        try:
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        except Exception:
            wanted = []  # the file is damaged; loading it gives a better error
        names = [name for name in wanted if BYSTANDERS.fullmatch(name)]
        with torch.serialization.safe_globals([(Bystander, name) for name in names]):
            return super()._content()

    def _load(self) -> "Mapping[str, torch.Tensor]":
        content = self._content()
        if not isinstance(content, Mapping) or not isinstance(content.get("module"), Mapping):
            raise self._unsound(
                "it has no state dict under 'module', as DeepSpeed's checkpoints do"
            )
        self.fields = {name: content[name] for name in KEPT if name in content}
        state = self._checked(self._flat(content["module"]))
        # A tensor can claim more numbers than the file has by repeating them.
        size = self.path.stat().st_size
        if large := [name for name, tensor in state.items() if tensor.nbytes > size]:
            raise self._unsound(f"it is smaller than its tensor {large[0]!r}")
        return {name: tensor for name, tensor in state.items() if LOCAL not in f".{name}"}

    def _flat(self, module: Mapping[Any, Any]) -> dict[Any, Any]:
        """Flatten nested dicts, with keys joined by dots."""
        flat: dict[Any, Any] = {}
        # A pickle can refer to one dict in many places, and inside itself.
        seen: set[int] = set()

        def walk(prefix: str, part: Mapping[Any, Any], depth: int) -> None:
            if depth > DEPTH or id(part) in seen:
                raise self._unsound("its state dict is nested too deeply, or contains itself")
            seen.add(id(part))
            for key, value in part.items():
                name = f"{prefix}{key}"
                if isinstance(value, Mapping):
                    walk(f"{name}.", value, depth + 1)
                elif name in flat:
                    raise self._unsound(f"its state dict contains {name!r} twice")
                else:
                    flat[name] = value

        walk("", module, 1)
        return flat
