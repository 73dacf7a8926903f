"""Load and save GPTs with experts as checkpoints of Megatron-DeepSpeed."""

import argparse
import collections
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from effscale.interop.deepspeed.expert_files import NAME, DeepSpeedMoE, expert_file
from effscale.interop.deepspeed.experts import REST, checkpoint, write_files
from effscale.interop.deepspeed.states import Bystander
from effscale.interop.describe import essence
from effscale.interop.folder import checked_folder
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.load import load_source
from effscale.interop.megatron.args import from_args, to_args
from effscale.interop.megatron.family import MEGATRON, table
from effscale.interop.plan import Slot, parameters, plan, values_of
from effscale.interop.save import stored_array
from effscale.interop.source import Source, check_experts
from effscale.interop.table import sizes
from effscale.interop.tensors import FolderError
from effscale.models import Transformer, TransformerConfig

VERSION = 3.0
"""The version of checkpoints written here, that of Megatron-DeepSpeed."""


def load_megatron_moe(
    folder: str | os.PathLike[str],
    config: TransformerConfig | None = None,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """Load a GPT with experts saved by Megatron-DeepSpeed, with standard or residual layers, in every n-th layer or as a pyramid.

    Tensors are read one at a time. The vocabulary keeps the rows that Megatron adds as padding.

    Args:
        folder: The folder of one checkpoint, such as ``.../global_step1000``, or its parent, whose file ``latest`` names
            the checkpoint. It must have been trained with ``--no-pipeline-parallel`` and one tensor-parallel rank.
        config: The config of the model. None reads it from the arguments that Megatron-DeepSpeed stores in the checkpoint.
        dtype: As for ``effscale.interop.load_pretrained``.
        mesh: As for ``effscale.interop.load_pretrained``.

    Returns:
        The model, which returns logits ``[batch, seq, vocab]``.

    Raises:
        FolderError: A file or tensor is missing or invalid; or the arguments are not in the checkpoint or describe a model that
            effscale does not support, such as one with rotary positions.
        ImportError: torch is not installed.

    References:
        Megatron-DeepSpeed, ``megatron/model`` and ``megatron/checkpointing.py``.
            https://github.com/deepspeedai/Megatron-DeepSpeed

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> from effscale.moe import MoEConfig, with_experts
        >>> dense = gpt2(num_layers=2, d_model=8, num_heads=2, vocab_size=11, max_length=4)
        >>> moe = MoEConfig(num_experts=2, expert=dense.blocks[0].feed_forward)
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     save_megatron_moe(Transformer(with_experts(dense, moe), rngs=nnx.Rngs(0)), folder)
        ...     load_megatron_moe(folder).config.layers[1].feed_forward.num_experts
        2
    """
    place = checked_folder(folder)
    with reading(f"{shown(str(place))} cannot be loaded"):
        tensors = DeepSpeedMoE(place)
        fields = tensors.fields
        if "checkpoint_version" not in fields:
            raise FolderError(
                f"{tensors.folder / REST}: has no checkpoint_version, which determines the order of queries, keys and values, so it is not a "
                "checkpoint of Megatron-DeepSpeed"
            )
        version = Fields(REST, fields).number("checkpoint_version")
        if config is None:
            args = fields.get("args")
            if not isinstance(args, Bystander) or not args.values:
                raise FolderError(
                    f"{tensors.folder / REST}: has no args, which describe the model. Pass its config."
                )
            config = from_args(args.values, len(tensors.infos))
        check_experts(config, len(tensors.infos))
        rules = table(version) + MEGATRON.heads
        names = frozenset(tensors.infos)
        source = Source(tensors.folder, MEGATRON, {}, config, rules, tensors, names)
    try:
        return load_source(source, dtype=dtype, mesh=mesh)
    except FolderError as error:
        error.add_note(
            "The config passed, or the args in the checkpoint, take the place of config.json."
        )
        raise


def save_megatron_moe(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Save a GPT with experts like Megatron-DeepSpeed, without the state of an optimizer.

    Args:
        model: A GPT-2 with experts in some of its layers, all of the same kind as its dense feed-forward.
        folder: The folder of the checkpoint, such as ``.../global_step0``; it is created if needed. To train from it,
            pass the parent folder to Megatron-DeepSpeed with ``--finetune``, and the name of the folder with
            ``--load-tag``.

    Raises:
        FolderError: The folder already contains experts, or the files cannot be written.
        ImportError: torch is not installed.
        ValueError: Megatron-DeepSpeed does not support the model.
    """
    args = _args_of(model.config)
    values, axes = values_of(model), sizes(model.config)
    files: dict[tuple[int, int], list[Slot]] = collections.defaultdict(list)
    rest: list[Slot] = []
    slots = plan(MEGATRON.rules, model.config, parameters(model))
    layers = sorted(
        {slot.layer for slot in slots if slot.rule.in_expert and slot.layer is not None}
    )
    for slot in slots:
        match = NAME.fullmatch(slot.name)
        if match is None or slot.layer is None:
            rest.append(slot)
        else:
            files[layers.index(slot.layer), int(match[2])].append(slot)

    def contents() -> Iterator[tuple[str, Any]]:
        for (layer, expert), own in files.items():
            yield (
                expert_file(layer, expert),
                {slot.name: stored_array(slot, values, axes) for slot in own},
            )
        module = _nested({slot.name: stored_array(slot, values, axes) for slot in rest})
        counts = [n for n in args["num_experts"] if n > 1]
        more = {"checkpoint_version": VERSION, "iteration": 0, "args": argparse.Namespace(**args)}
        yield REST, checkpoint(module, counts, **more)

    write_files(folder, contents())


def _args_of(config: TransformerConfig) -> dict[str, Any]:
    """Return arguments that convert back to the same config."""
    try:
        args = to_args(config)
        back = from_args(args, config.num_layers)
    except ValueError as error:
        raise ValueError(f"Megatron-DeepSpeed does not support this model: {error}") from error
    ours, theirs = (essence(MEGATRON.plain(one)) for one in (config, back))
    different = [path for path in ours | theirs if ours.get(path) != theirs.get(path)]
    if different:
        path = different[0]
        raise ValueError(
            f"Megatron-DeepSpeed does not support this model: {path} must be {theirs.get(path)!r}, got {ours.get(path)!r}"
        )
    return args


def _nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return a state dict in Megatron's nested form: the parts of the language model, with the embeddings separate."""
    nested: dict[str, Any] = {}
    for name, array in flat.items():
        root, section, inner = name.split(".", 2)
        at = nested.setdefault(root, {}).setdefault(section, {})
        if section == "embedding":
            module, inner = inner.split(".", 1)
            at = at.setdefault(module, {})
        at[inner] = array
    return nested
