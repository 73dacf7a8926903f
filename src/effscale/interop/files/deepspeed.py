"""DeepSpeed's ``mp_rank_XX_model_states.pt``: a model's state dict beside the state of its training."""

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
"""Objects that such files hold beside tensors: Megatron's arguments, loss scalers, settings, a generator's state."""

KEPT = ("args", "checkpoint_version", "num_experts")
"""What is kept of a file beside the model."""

DEPTH = 8
"""How deep a model's state dict may be nested; Megatron's is nested three deep."""

LOCAL = ".deepspeed_moe.experts.deepspeed_experts."
"""In the names of experts. In this file they would be those of one process, under its own numbers."""


class Bystander:
    """Stands for an object that is not needed: it does nothing, and keeps the attributes that it is given."""

    values: Mapping[str, Any] = {}

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.values = dict(state)


class ModelStates(TorchFile):
    """The state dict under ``module``, flat; see ``effscale.interop.files.torch.TorchFile``.

    Megatron's is a dict of dicts, whose keys are joined by points to the names of the parameters.

    The file also holds objects of DeepSpeed's and Megatron's own classes. The restricted unpickler makes a
    ``Bystander`` of each in place of importing its class; an object of any other class is refused, as in every file.

    Args:
        path: The file.

    Attributes:
        fields: What else is known of the model: those of ``KEPT`` that the file has.

    Raises:
        ImportError: There is no torch.
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
            wanted = []  # the file is damaged, which loading says better
        names = [name for name in wanted if BYSTANDERS.fullmatch(name)]
        with torch.serialization.safe_globals([(Bystander, name) for name in names]):
            return super()._content()

    def _load(self) -> "Mapping[str, torch.Tensor]":
        content = self._content()
        if not isinstance(content, Mapping) or not isinstance(content.get("module"), Mapping):
            raise self._unsound("it has no state dict under 'module', as a checkpoint of DeepSpeed")
        self.fields = {name: content[name] for name in KEPT if name in content}
        state = self._checked(self._flat(content["module"]))
        # A tensor can claim more numbers than the file has, by repeating them.
        size = self.path.stat().st_size
        if large := [name for name, tensor in state.items() if tensor.nbytes > size]:
            raise self._unsound(f"it is smaller than the tensor {large[0]!r} that it names")
        return {name: tensor for name, tensor in state.items() if LOCAL not in f".{name}"}

    def _flat(self, module: Mapping[Any, Any]) -> dict[Any, Any]:
        """The values of nested dicts, by their keys joined by points."""
        flat: dict[Any, Any] = {}
        # A pickle can name one dict in many places, and in itself.
        seen: set[int] = set()

        def walk(prefix: str, part: Mapping[Any, Any], depth: int) -> None:
            if depth > DEPTH or id(part) in seen:
                raise self._unsound("its state dict is nested too deep, or in itself")
            seen.add(id(part))
            for key, value in part.items():
                name = f"{prefix}{key}"
                if isinstance(value, Mapping):
                    walk(f"{name}.", value, depth + 1)
                elif name in flat:
                    raise self._unsound(f"its state dict has {name!r} twice")
                else:
                    flat[name] = value

        walk("", module, 1)
        return flat
