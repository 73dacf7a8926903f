"""Load a model from a folder: each tensor is read once and placed directly where it belongs."""

import collections
import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from rich.console import Console
from rich.progress import track

from effscale.interop.heads import initial_values, with_heads
from effscale.interop.pieces import WeightPieces
from effscale.interop.plan import Slot, form_changes, parameters, plan, their_shapes
from effscale.interop.source import Source, open_source
from effscale.interop.table import sizes
from effscale.interop.tensors import FolderError, StructuredTensor, TensorInfo
from effscale.models import Transformer, abstract_model, split_groups
from effscale.models.config import HeadConfig
from effscale.parallel import shardings

LONG = 500_000_000
"""Number of parameters from which loading takes long enough for a progress bar."""

FLOATS = tuple(np.dtype(name) for name in ("float32", "float16", ml_dtypes.bfloat16))


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    heads: Sequence[HeadConfig] | None = None,
    initialize: Collection[str] = (),
    key: PRNGKeyArray | None = None,
) -> Transformer:
    """Load a PyTorch model of any supported family, as saved by transformers or DeepSpeed-Chat.

    Safetensors files are read without torch, ``.bin`` files with ``torch.load(weights_only=True)``. Tensors are
    read one at a time, each into its place on the devices; nothing else of the file is held in memory. Nothing is
    downloaded.

    Args:
        folder: A folder with ``config.json`` and weights, or a GGUF file of a Llama.
        dtype: Dtype of the parameters and of the computation: float32, bfloat16 or float16. None: that of the file, tensor
            by tensor.
        mesh: Mesh for the parameters, by the rules of ``effscale.parallel``; None: the default device.
        heads: The heads of the model, such as a reward or classifier head on the trunk of a language model; ``()``: only
            the trunk. A head that the folder has, by its name, is loaded; ``score``, ``classes`` and ``value`` with one
            output are three names of the same head. Heads of the folder that are not listed are left out. None: the
            folder's heads.
        initialize: Names of heads to initialize even if the folder has them.
        key: Key for initializing heads that the folder does not have, and BERT's pooler if a head needs it.

    Returns:
        The model. A model with only a next-token head returns logits. Any other returns a dict with ``hidden``, ``pooled``
        if there is a pooler, and each head's output: ``mlm``, ``nsp``, ``classes`` (one row per text or image),
        ``token_classes``, ``span`` and ``value`` (one row per token).

    Raises:
        FolderError: The folder, a file or a tensor is invalid. One error lists all tensors that are missing, unexpected
            or of the wrong shape.
        ImportError: The weights are in a ``.bin`` file and torch is not installed.
        ValueError: ``dtype`` is not one of the three; or one of ``heads`` has another form in the folder (number of classes,
            bias), is not in the folder and there is no ``key``, or is not supported by the family.

    Warns:
        UserWarning: A tensor contains NaN or values beyond the range of ``dtype``, or two tensors that should be the same
            differ.

    Example:
        >>> import tempfile, jax
        >>> from flax import nnx
        >>> from effscale.interop import load_pretrained, save_pretrained
        >>> from effscale.models import ClassHead, Transformer, gpt2
        >>> config = gpt2(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_length=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), folder)
        ...     model = load_pretrained(folder)
        ...     score = ClassHead(name="score", num_classes=1, pool="last", bias=False)
        ...     reward = load_pretrained(folder, heads=(score,), key=jax.random.key(0))
        >>> model.config.d_model, list(model.heads), list(reward.heads)
        (8, ['lm'], ['score'])
    """
    source = open_source(folder)
    if heads is not None or initialize:
        source = with_heads(source, heads, initialize)
    return load_source(source, dtype=dtype, mesh=mesh, key=key)


def load_source(
    source: Source, *, dtype: Any = None, mesh: Mesh | None = None, key: PRNGKeyArray | None = None
) -> Transformer:
    """Load a model from an open source; the arguments are those of ``load_pretrained``."""
    chosen = None if dtype is None else float_type(dtype)
    computes = chosen or _most_common(source)
    types = _types(source, chosen, computes)
    config = dataclasses.replace(source.config, dtype=computes.name)  # pyrefly: ignore[bad-argument-type]
    source = dataclasses.replace(source, config=config)
    return fill(source, types, mesh, initial_values(source, key, computes, mesh))


def fill(
    source: Source,
    types: Mapping[str, np.dtype],
    mesh: Mesh | None,
    initial: Mapping[str, jax.Array],
) -> Transformer:
    """Return a model of ``source.config`` with the source's tensors, with the given dtypes by name.

    Groups of layers are split where a tensor's form changes from one layer to the next. Parameters for which there is no
    tensor have the ``initial`` values.
    """
    model = abstract_model(source.config)
    leaves = _to_fill(model, source)
    slots = plan(source.rules, source.config, leaves)
    check_tensors(source, slots, leaves)
    axes = sizes(source.config)
    if changes := form_changes(slots, source.tensors.infos):
        model = split_groups(model, changes)
        leaves = _to_fill(model, source)
        slots = plan(source.rules, model.config, leaves)
    leaf_types: dict[str, np.dtype] = {}
    for slot in slots:
        for leaf in slot.leaves:
            one = types[slot.name]
            same = (
                leaf_types.setdefault(leaf, one) == one
            )  # the tensors of all layers are one array
            leaf_types[leaf] = one if same else np.dtype("float32")

    waiting = collections.Counter(leaf for slot in slots for leaf in slot.leaves)
    filling: dict[str, WeightPieces] = {}
    weights: dict[str, Any] = dict(initial)
    for slot in shown(slots, source):
        tensor = source.tensors.read(slot.name)
        if isinstance(tensor, StructuredTensor):
            ours = _structured(slot, tensor, types[slot.name], axes, leaves)
        else:
            tensor = convert(slot.name, tensor, types[slot.name], stacklevel=4)
            ours = slot.rule.to_ours(tensor, axes)
        if any(has_nan(array) for array in jax.tree.leaves(ours) if array.dtype in FLOATS):
            warnings.warn(f"{slot.name} contains NaN", stacklevel=3)
        for leaf, weight in zip(slot.leaves, ours, strict=True):
            if leaf not in filling:
                stack = leaves[leaf].get_value().shape[: len(slot.index)]
                like = _stacked(weight, stack, leaf_types[leaf])
                place = None if mesh is None else shardings(leaves[leaf].replace(like), mesh)
                filling[leaf] = WeightPieces(like, None if place is None else place.get_value())
            filling[leaf].put(slot.index, weight)
            waiting[leaf] -= 1
            if not waiting[leaf]:
                weights[leaf] = filling.pop(leaf).finish()
        del tensor, ours  # before the next one is read
    graphdef, state = nnx.split(model)
    flat = [
        (path, variable.replace(weights[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _to_fill(model: Transformer, source: Source) -> dict[str, nnx.Variable]:
    """Return the parameters that tensors of the source fill."""
    return {path: leaf for path, leaf in parameters(model).items() if path not in source.fresh}


def _structured(
    slot: Slot,
    tensor: StructuredTensor,
    dtype: np.dtype,
    axes: Mapping[str, int],
    leaves: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Return effscale's weights for a structured tensor, with the shapes that the model has."""
    found = tensor.weights(lambda array: slot.rule.to_ours(array, axes), dtype)
    for leaf, weight in zip(slot.leaves, found, strict=True):
        wanted = tuple(leaves[leaf].get_value().shape[len(slot.index) :])
        if tuple(weight.shape) != wanted:
            raise FolderError(
                f"{slot.name} must have the shape {list(wanted)} for {leaf} according to config.json, got {list(weight.shape)}"
            )
    return found


def _stacked(weight: Any, stack: tuple[int, ...], dtype: np.dtype) -> Any:
    """Return the shapes of a stack of such weights; a plain array has the given dtype."""
    of = lambda array: dtype if isinstance(weight, np.ndarray) else array.dtype
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*stack, *a.shape), of(a)), weight)


def shown(slots: list[Slot], source: Source) -> Iterable[Slot]:
    """Return the slots, with a progress bar on the terminal if loading takes long."""
    size = sum(math.prod(source.tensors.infos[slot.name].shape) for slot in slots)
    if size < LONG or not sys.stderr.isatty():
        return slots
    return track(slots, f"loading {source.path.name}", console=Console(stderr=True), transient=True)


def check_tensors(source: Source, slots: Sequence[Slot], leaves: Mapping[str, Any]) -> None:
    """Raise one error that lists every tensor that is missing, unexpected, of the wrong shape or not of a float type."""
    infos = source.tensors.infos
    wanted = their_shapes(slots, leaves, sizes(source.config))
    wrong = [f"missing: {name} {list(wanted[name])}" for name in sorted(set(wanted) - source.names)]
    for name in sorted(source.names):
        info = infos[name]
        if name not in wanted:
            wrong.append(f"unexpected: {name} {list(info.shape)}")
        else:
            wrong += misfits(name, info, wanted[name], "config.json needs")
    if wrong:
        raise FolderError(
            f"the tensors in {source.path} are not those of the {source.family.model_type} that its config.json "
            f"describes:\n  " + "\n  ".join(wrong)
        )


def misfits(name: str, info: TensorInfo, shape: Sequence[int], who_needs: str) -> list[str]:
    """Return what is wrong with the shape and the type of a tensor of floats."""
    if tuple(info.shape) != tuple(shape):
        return [f"wrong shape: {name} {list(info.shape)}, but {who_needs} {list(shape)}"]
    is_float = info.dtype in (*FLOATS, np.dtype("float64"))
    return [] if is_float else [f"not of a float type: {name} {info.dtype}"]


def convert(name: str, tensor: np.ndarray, dtype: np.dtype, *, stacklevel: int = 3) -> np.ndarray:
    """Convert a tensor to another dtype, rounding to the nearest; warns, with its name, about values that become infinite."""
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore", invalid="ignore"):
        array = tensor.astype(dtype)
    if ml_dtypes.finfo(dtype).maxexp < ml_dtypes.finfo(tensor.dtype).maxexp:
        infinite = np.isinf(array)
        if infinite.any() and (infinite & ~np.isinf(tensor)).any():
            warnings.warn(
                f"{name} has values beyond the range of {dtype.name}, which become infinite",
                stacklevel=stacklevel,
            )
    return array


def float_type(dtype: Any) -> np.dtype:
    """Return the dtype of parameters, from its name or type."""
    try:
        chosen = np.dtype(jax.numpy.dtype(dtype))
    except TypeError as error:
        raise ValueError(f"dtype must be a type, got {dtype!r}: {error}") from error
    if chosen not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {chosen.name!r}")
    return chosen


def _types(source: Source, chosen: np.dtype | None, computes: np.dtype) -> dict[str, np.dtype]:
    """Return the dtype of each tensor in the model. JAX disables float64 by default, so that becomes float32.

    A structured tensor has the dtype in which the model computes.
    """

    def narrow(info: TensorInfo) -> np.dtype:
        if info.form is not None:
            return computes
        return np.dtype("float32") if info.dtype == np.dtype("float64") else info.dtype

    return {name: chosen or narrow(source.tensors.infos[name]) for name in source.names}


def _most_common(source: Source) -> np.dtype:
    """Return the dtype of most of the numbers, among tensors that are stored unpacked."""
    counts: collections.Counter[np.dtype] = collections.Counter()
    for name in source.names:
        info: TensorInfo = source.tensors.infos[name]
        if info.form is None:
            counts[info.dtype] += math.prod(info.shape)
    floats = [dtype for dtype, _ in counts.most_common() if dtype in FLOATS]
    return floats[0] if floats else np.dtype("float32")


def has_nan(tensor: np.ndarray) -> bool:
    """Return whether any value is NaN."""
    if tensor.dtype == ml_dtypes.bfloat16:
        # Compares bits, because ml_dtypes' own test takes many times as long.
        return bool(((tensor.view(np.uint16) & 0x7FFF) > 0x7F80).any())
    return bool(np.isnan(tensor).any())
