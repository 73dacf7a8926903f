"""The layout of a checkpoint on disk, and reading it without a training state, and which ones to keep.

::

    checkpoints/step_00000300/
        model/  train/  ema/       the items of the state: arrays (Orbax), each leaf under its dotted name
        iterator/process_0-of-1.json   position in the data
        run/run.json               step, config, updates skipped in a row; name, shape and type of every leaf
        manifest.json              checksums, written last
"""

import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from effscale.training.errors import CheckpointError
from effscale.training.manifest import MANIFEST, verify_manifest
from effscale.training.partition import combine, named_leaves, partition
from effscale.training.storage import AnyPath, folder_path, is_local, move, remove

logger = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"
DELETED = ".deleted"
WRITING = ".writing"
_STEP = re.compile(r"step_(\d{8,})$")


@runtime_checkable
class Resizable(Protocol):
    """A node of a state whose shapes depend on the size of the run, such as what each worker keeps."""

    def resized_like(self, wanted: Any) -> Any:
        """Return the node, saved by a run of another size, for the run of ``wanted``."""
        ...


def step_folder(folder: AnyPath, step: int) -> AnyPath:
    """Return the folder of one checkpoint."""
    return folder / f"step_{step:08d}"


def finished_steps(folder: AnyPath) -> list[int]:
    """Return the steps of the completely written checkpoints, in ascending order."""
    return [step for step, path in _steps(folder) if (path / MANIFEST).exists()]


def writing_mark(path: AnyPath) -> AnyPath:
    """Return the marker file of a checkpoint, which exists until its manifest is written."""
    return path.with_name(path.name + WRITING)


def is_step_folder(path: pathlib.PurePath) -> bool:
    """Return whether a path has the name of a checkpoint."""
    return _STEP.match(path.name) is not None


def without_manifest(folder: AnyPath) -> list[AnyPath]:
    """Return completely written checkpoints that cannot be verified, as their manifest is missing."""
    return [path for path in _without_manifest(folder) if not writing_mark(path).exists()]


def leftovers(folder: AnyPath) -> list[AnyPath]:
    """Return partially written or partially deleted checkpoints of a killed run; they can be deleted."""
    if not folder.is_dir():
        return []
    killed = [path for path in _without_manifest(folder) if writing_mark(path).exists()]
    return sorted(
        entry
        for entry in folder.iterdir()
        if TEMPORARY in entry.name or entry.name.endswith((DELETED, WRITING)) or entry in killed
    )


def delete_checkpoint(path: AnyPath) -> None:
    """Delete a checkpoint such that a partially deleted one is never taken for a complete one."""
    if is_local(path):
        doomed = path.with_name(path.name + DELETED)
        move(path, doomed)
        remove(doomed)
        return
    # Where renaming is not possible, mark it as if it were still being written.
    writing_mark(path).write_text("")
    remove(path / MANIFEST)
    remove(path)
    remove(writing_mark(path))


def _without_manifest(folder: AnyPath) -> list[AnyPath]:
    return [path for _, path in _steps(folder) if not (path / MANIFEST).exists()]


def _steps(folder: AnyPath) -> list[tuple[int, AnyPath]]:
    """Return step and folder of all checkpoints, in ascending order."""
    if not folder.is_dir():
        return []
    found = [(_STEP.match(entry.name), entry) for entry in folder.iterdir()]
    return sorted((int(match[1]), entry) for match, entry in found if match and entry.is_dir())


class JsonItem:
    """A JSON file inside an Orbax checkpoint (Orbax's ``StatefulCheckpointable`` protocol).

    The value is fixed when ``save`` is called, before training continues.
    """

    def __init__(self, name: str, value: Any):
        self.name, self.text = name, json.dumps(value, indent=1)

    async def save(self, directory: Any) -> Any:
        """Write ``<directory>/<name>`` once Orbax has created the directory."""

        async def write() -> None:
            (await directory.await_creation() / self.name).write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        """Not supported; part of the protocol, but the file is read without Orbax."""
        raise NotImplementedError(f"{directory} is read as plain JSON")


def flat(tree: Any) -> dict[str, Any]:
    """Return the tree's leaves by name, without empty arrays, which Orbax cannot save."""
    leaves = named_leaves(tree)
    found = {leaf.name or "value": leaf.leaf for leaf in leaves}
    if len(found) < len(leaves):
        raise CheckpointError(
            "two leaves of the state have the same name. Rename an attribute or a key that contains a dot."
        )
    return {name: leaf for name, leaf in found.items() if getattr(leaf, "size", 1)}


def unflat(tree: Any, values: Mapping[str, Any]) -> Any:
    """Return the tree with its leaves taken from ``values``."""
    leaves = [
        values[leaf.name or "value"]
        if getattr(leaf.leaf, "size", 1)
        else jax.numpy.zeros(leaf.leaf.shape, leaf.leaf.dtype)
        for leaf in named_leaves(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def describe(items: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the shape and type of every leaf, for ``run.json``."""
    return {
        item: {
            name: [list(leaf.shape), str(leaf.dtype)]
            if hasattr(leaf, "dtype")
            else type(leaf).__name__
            for name, leaf in flat(tree).items()
        }
        for item, tree in items.items()
    }


def check_structure(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: AnyPath) -> None:
    """Raise an error if the leaves of a checkpoint are not those requested."""
    problems = []
    for item, leaves in wanted.items():
        have = saved.get(item)
        if have is None:
            problems.append(f"it has no {item!r} (only {', '.join(sorted(saved))})")
            continue
        problems += [f"{item}: {name} is missing" for name in leaves.keys() - have.keys()]
        problems += [
            f"{item}: {name} is saved but not requested" for name in have.keys() - leaves.keys()
        ]
        problems += [
            f"{item}: {name} is saved as {have[name]}, requested as {leaves[name]}"
            for name in leaves.keys() & have.keys()
            if have[name] != leaves[name]
        ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (
            f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise CheckpointError(
            f"{where}: saved from a different model, optimizer or option: {shown}"
        )


def read_run(path: AnyPath) -> dict[str, Any]:
    """Return the content of ``run.json`` of a checkpoint.

    Raises:
        OSError, ValueError: It cannot be read, for instance because the checkpoint is damaged.
    """
    run = json.loads((path / "run" / "run.json").read_text(encoding="utf-8"))
    if not isinstance(run, dict):
        raise ValueError(f"{path}: run.json is not an object")
    return run


def load_items(path: AnyPath, items: Mapping[str, Any]) -> dict[str, Any]:
    """Read some of a checkpoint's items into trees like the given ones (arrays or their abstract form).

    A node that is `Resizable` may have been saved by a run of another size.

    Raises:
        CheckpointError: The leaves of the checkpoint differ from those requested.
    """
    # Importing Orbax takes over half a second, so only reads and writes import it.
    from orbax.checkpoint import v1 as ocp

    saved = read_run(path)["leaves"]
    resized = {item for item, tree in items.items() if _sizes_differ(tree, saved.get(item, {}))}
    as_saved = {
        item: _as_saved(tree, saved[item]) if item in resized else tree
        for item, tree in items.items()
    }
    check_structure(saved, describe(as_saved), path)
    default = jax.sharding.make_single_device_sharding(jax.local_devices()[0])

    def wanted(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=default if sharding is None else sharding
        )

    loaded = ocp.load_checkpointables(
        str(path), {item: jax.tree.map(wanted, flat(tree)) for item, tree in as_saved.items()}
    )
    found = {item: unflat(tree, loaded[item]) for item, tree in as_saved.items()}
    for item in resized:
        found[item] = _resized(found[item], items[item], path)
    return found


def _is_resizable(node: Any) -> bool:
    return isinstance(node, Resizable)


def _in_resizable(tree: Any) -> list[bool]:
    """Return, for each leaf of the tree, whether it is in a `Resizable`."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_resizable)
    return [_is_resizable(node) for node in nodes for _ in jax.tree.leaves(node)]


def _sizes_differ(tree: Any, saved: Mapping[str, Any]) -> bool:
    """Return whether the shapes in a `Resizable` differ in the checkpoint."""
    return any(
        resizable and leaf.name in saved and saved[leaf.name][0] != list(leaf.leaf.shape)
        for leaf, resizable in zip(named_leaves(tree), _in_resizable(tree), strict=True)
    )


def _as_saved(tree: Any, saved: Mapping[str, Any]) -> Any:
    """Return the abstract tree with each `Resizable` in the shapes of the checkpoint, replicated on every device."""

    def leaf_as_saved(leaf: Any, resizable: bool) -> Any:
        if not resizable or leaf.name not in saved:
            return leaf.leaf
        sharding = getattr(leaf.leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            sharding = jax.NamedSharding(sharding.mesh, jax.P())
        return jax.ShapeDtypeStruct(saved[leaf.name][0], leaf.leaf.dtype, sharding=sharding)

    pairs = zip(named_leaves(tree), _in_resizable(tree), strict=True)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaf_as_saved(*pair) for pair in pairs])


def _resized(loaded: Any, wanted: Any, path: AnyPath) -> Any:
    """Convert a tree saved by a run of another size."""

    def resize(loaded: Any) -> Any:
        visit = lambda node, like: node.resized_like(like) if _is_resizable(node) else node
        return jax.tree.map(visit, loaded, wanted, is_leaf=_is_resizable)

    shapes = [
        x.shape for x in jax.tree.leaves(jax.eval_shape(resize, loaded)) if hasattr(x, "shape")
    ]
    if shapes != [x.shape for x in jax.tree.leaves(wanted) if hasattr(x, "shape")]:
        raise CheckpointError(
            f"{path}: saved on a mesh whose axes other than the workers' divide the parameters differently. Resume on a mesh "
            "that differs only along the workers' axis."
        )
    places = jax.tree.map(lambda x: getattr(x, "sharding", None), wanted)
    return jax.jit(resize, out_shardings=places)(loaded)


def cannot_be_verified(folder: AnyPath, lost: Sequence[AnyPath]) -> str:
    """Return the message for a folder in which no checkpoint has its manifest."""
    return (
        f"{folder}: contains {', '.join(path.name for path in lost)}, all without manifest.json. They cannot be verified and "
        "are left as they are"
    )


def no_such_step(folder: AnyPath, step: int) -> str:
    """Return the message for a missing checkpoint."""
    there = ", ".join(map(str, finished_steps(folder))) or "none"
    lost = " (one without its manifest.json, which cannot be verified)"
    unverified = lost if step_folder(folder, step).is_dir() else ""
    return f"{folder}: no checkpoint of step {step}{unverified}; available steps: {there}"


def _newest(folder: str | os.PathLike[str], step: int | None) -> AnyPath:
    """Return the newest intact checkpoint (or that of ``step``) of a run folder or of its ``checkpoints`` folder."""
    root = folder_path(folder)
    if (root / "checkpoints").is_dir():
        root = root / "checkpoints"
    steps = finished_steps(root)
    if not steps:
        if lost := without_manifest(root):
            raise CheckpointError(cannot_be_verified(root, lost))
        raise FileNotFoundError(f"{root}: no checkpoint found")
    if step is not None and step not in steps:
        raise FileNotFoundError(no_such_step(root, step))
    problems = []
    for candidate in [step] if step is not None else reversed(steps):
        path = step_folder(root, candidate)
        problem = verify_manifest(path)
        if problem is None:
            return path
        logger.warning("%s is damaged: %s", path, problem)
        problems.append(f"step {candidate}: {problem}")
    raise CheckpointError(f"{root}: no usable checkpoint: {'; '.join(problems)}")


def read_checkpoint_config(folder: str | os.PathLike[str], step: int | None = None) -> Any:
    """Return the saved config of a run, as plain JSON values.

    Args:
        folder: A run folder or its ``checkpoints`` folder.
        step: The checkpoint; None takes the newest intact one.

    Raises:
        FileNotFoundError: No checkpoint exists, or none of that step.
        CheckpointError: All checkpoints are damaged.
    """
    return read_run(_newest(folder, step))["config"]


def restore_model(
    folder: str | os.PathLike[str],
    abstract_model: Any,
    *,
    step: int | None = None,
    ema: bool = False,
    item: str = "model",
) -> tuple[Any, int]:
    """Read only the model from a checkpoint, for instance for generation. The run may still be in progress.

    Args:
        folder: A run folder or its ``checkpoints`` folder.
        abstract_model: The module, or its abstract form from ``jax.eval_shape``; arrays are placed with its shardings.
        step: The checkpoint; None takes the newest intact one.
        ema: Whether to read the moving average in place of the trained leaves.
        item: The place of the model in a custom state: the name of its field, or ``field.model`` if the field is a
            ``TrainState``.

    Returns:
        The module and its step.

    Raises:
        FileNotFoundError: No checkpoint exists, or none of that step.
        CheckpointError: All checkpoints are damaged, the model differs, or no average was kept.
    """
    path = _newest(folder, step)
    run = read_run(path)
    if not ema:
        return load_items(path, {item: abstract_model})[item], run["step"]
    average = f"{item.removesuffix('model')}ema"
    names = run["leaves"].get(average)
    if names is None:
        raise CheckpointError(f"{path}: no moving average was saved. Restore with ema=False.")
    averaged, _ = partition(abstract_model, lambda name: name in names)
    items = load_items(path, {item: abstract_model, average: averaged})
    return combine(items[average], items[item]), run["step"]


def superseded(folder: AnyPath, keep: int) -> list[int]:
    """Return the steps of the checkpoints that can be deleted.

    The newest ``keep`` checkpoints saved right after an update are kept, and the newest of all. While consecutive updates are
    skipped the model does not change, so checkpoints from that time never replace those from before it.
    """
    good, skipping = _by_kind(folder)
    newest = max(good + skipping, default=None)
    kept = {*good[-keep:], newest}
    return [step for step in sorted(good + skipping) if step not in kept]


def last_good(folder: AnyPath) -> int | None:
    """Return the step of the newest checkpoint that was saved right after an update, not while updates were being skipped."""
    good, _ = _by_kind(folder)
    return good[-1] if good else None


def _by_kind(folder: AnyPath) -> tuple[list[int], list[int]]:
    """Return the steps saved right after an update, and those saved while updates were being skipped, without unreadable checkpoints."""
    good: list[int] = []
    skipping: list[int] = []
    for step in finished_steps(folder):
        try:
            skipped = read_run(step_folder(folder, step)).get("skipped_in_row", 0)
        except (OSError, ValueError):
            continue
        (skipping if skipped else good).append(step)
    return good, skipping
