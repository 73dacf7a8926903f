"""Checkpoints of a run: written atomically in the background, and verified when read."""

import base64
import contextlib
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effscale.parallel.peers import collect_on_first
from effscale.training.checkpoint_files import (
    TEMPORARY,
    JsonItem,
    cannot_be_verified,
    delete_checkpoint,
    describe,
    finished_steps,
    flat,
    last_good,
    leftovers,
    load_items,
    no_such_step,
    read_run,
    step_folder,
    superseded,
    without_manifest,
    writing_mark,
)
from effscale.training.errors import CheckpointError
from effscale.training.items import items_of, state_of
from effscale.training.manifest import MANIFEST, digest_part, verify_manifest, write_manifest
from effscale.training.serialize import differences, to_json
from effscale.training.storage import AnyPath, folder_path, is_local, make_folder, move, remove

logger = logging.getLogger(__name__)


_SAVES = itertools.count()  # the same on all processes, as they save together

_START_AFRESH = "to start a new run, choose another folder or move this one away"


class Restored(NamedTuple):
    """A restored state, the step it was saved at, and (step, reason) for each damaged checkpoint that was skipped."""

    state: Any
    step: int
    skipped: list[tuple[int, str]]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    A checkpoint contains the whole state, the position of the data iterator and the config. The state is a ``TrainState`` or any
    other pytree; its parts are saved separately under their names (`effscale.training.HasItems`).

    A checkpoint is complete once its checksums are written, as the last step; older ones are deleted only after that. So after a
    crash, a kill or a full disk, the previous checkpoint is still there. ``restore`` verifies the checksums and falls back to
    the next older checkpoint. A checkpoint that this run neither restored nor saved is never overwritten.

    Args:
        folder: Where to store them: a local folder, created when first needed, or ``gs://bucket/...`` (the extra ``gcs``).
        config: The run's config (dataclass or mapping). It is saved, and restoring a checkpoint with a different config
            raises an error.
        free_fields: Dotted names of config fields that may change between runs, such as ``num_steps``.
        keep: The number of checkpoints to keep. While updates are being skipped one more is kept, so that the last
            ``keep`` from before stay.
        every: ``save`` writes at multiples of this step; None writes only with ``force=True``.
        asynchronous: Whether to write in a background thread. Errors are then raised by the next ``save``, ``check`` or ``wait``.

    Raises:
        ValueError: An option is out of range, or ``folder`` is a URL that does not start with ``gs://``.
        OSError: A bucket cannot be read, for instance because credentials are missing.

    >>> checkpoints = Checkpoints("runs/example/checkpoints", every=500)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Any = None,
        free_fields: Sequence[str] = (),
        keep: int = 3,
        every: int | None = None,
        asynchronous: bool = True,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if every is not None and every < 1:
            raise ValueError(
                f"every must be at least 1, got {every}. Use None to save only at the end and when stopped."
            )
        self.folder = folder_path(folder)
        self.config = None if config is None else json.loads(json.dumps(to_json(config)))
        self.free_fields = tuple(free_fields)
        self.keep, self.every, self.asynchronous = keep, every, asynchronous
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._cleaned = False
        self._start: int | None = (
            None  # the step restored from: newer ones on disk belong to an abandoned continuation
        )
        self._saved: set[int] = set()

    @property
    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, in ascending order."""
        return finished_steps(self.folder)

    @property
    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return self.steps[-1] if self.steps else None

    @property
    def last_good(self) -> int | None:
        """The step of the newest finished checkpoint that was not saved while updates were being skipped."""
        return last_good(self.folder)

    @property
    def is_empty(self) -> bool:
        """Whether the folder has no checkpoint, including those that cannot be verified."""
        return not (self.steps or without_manifest(self.folder))

    def save(
        self, step: int, state: Any, data_iterator: Any = None, *, force: bool = False
    ) -> bool:
        """Save if ``step`` is a multiple of ``every`` or ``force`` is set, unless this step is already saved.

        The state may be donated to the next step as soon as this returns.

        Args:
            step: The number of batches that ``state`` has consumed.
            state: The training state: any pytree. Its ``skipped_in_row``, if it has one, shows whether it is saved while
                updates are being skipped.
            data_iterator: Any object with ``get_state`` and ``set_state``, such as a grain iterator.
            force: Whether to save regardless of ``every``.

        Returns:
            Whether a checkpoint is being written.

        Raises:
            CheckpointError: This save failed, a previous save failed in the background, or the folder contains checkpoints of
                this step or later ones that this run neither restored nor saved.
        """
        self.check()
        if step in self._saved or not (
            force or (self.every is not None and step % self.every == 0)
        ):
            return False
        self.wait()
        self.clean(step)
        path = step_folder(self.folder, step)
        items = items_of(state)
        run = {
            "format": 1,
            "step": step,
            "skipped_in_row": int(getattr(state, "skipped_in_row", 0)),
            "config": self.config,
            "processes": jax.process_count(),
            "leaves": describe(items),
        }
        content: dict[str, Any] = {item: flat(tree) for item, tree in items.items()}
        content["run"] = JsonItem("run.json", run)
        if data_iterator is not None:
            content["iterator"] = JsonItem(_iterator_file(), _encode(data_iterator.get_state()))
        from orbax.checkpoint import v1 as ocp  # slow to import, see load_items

        clock = _wall_clock()
        try:
            if jax.process_index() == 0:
                writing_mark(path).write_text("")
            response = ocp.save_checkpointables_async(str(path), content)
        except Exception as error:
            raise self._failure(step, error) from error
        self._saved.add(step)
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, response, next(_SAVES), clock),
            name=f"checkpoint-{step}",
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()
            if step not in self._saved:  # the clock was set meanwhile
                return self.save(step, state, data_iterator, force=force)
        return True

    def restore(
        self, abstract_state: Any, data_iterator: Any = None, step: int | None = None
    ) -> Restored | None:
        """Restore the newest intact checkpoint.

        Args:
            abstract_state: A state with the expected structure, of arrays or ``jax.ShapeDtypeStruct``. Its shardings decide
                where the arrays are placed; they may belong to a different mesh than the one they were saved from.
            data_iterator: The iterator to set to the saved position.
            step: Restore only this checkpoint. Newer ones are moved to ``set_aside/`` when the run saves again.

        Returns:
            The state and its step, or None if nothing has been saved.

        Raises:
            CheckpointError: The checkpoint belongs to a different config or model, or all are damaged or lack their manifests.
            FileNotFoundError: No checkpoint of ``step`` exists.
        """
        self.wait()
        steps = self.steps
        if step is not None and step not in steps:
            raise FileNotFoundError(no_such_step(self.folder, step))
        lost = without_manifest(self.folder)
        if lost and not steps:
            raise CheckpointError(f"{cannot_be_verified(self.folder, lost)}; {_START_AFRESH}")
        for left in [*leftovers(self.folder), *lost]:
            logger.warning("%s was not finished and is skipped", left)
        skipped: list[tuple[int, str]] = []
        for candidate in [step] if step is not None else reversed(steps):
            path = step_folder(self.folder, candidate)
            problem = _first_problem(
                verify_manifest(path, jax.process_index(), jax.process_count())
            )
            if problem is None:
                self._check_config(path)
                items = load_items(path, items_of(abstract_state))
                state = state_of(abstract_state, items)
                if data_iterator is not None:
                    data_iterator.set_state(_read_iterator(path))
                self._start, self._saved, self._cleaned = candidate, {candidate}, False
                return Restored(state, candidate, skipped)
            skipped.append((candidate, problem))
            logger.warning(
                "the checkpoint of step %d is damaged (%s); trying the previous one",
                candidate,
                problem,
            )
        if skipped:
            listed = "; ".join(f"step {number}: {reason}" for number, reason in skipped)
            raise CheckpointError(
                f"{self.folder}: no usable checkpoint ({listed}); {_START_AFRESH}"
            )
        return None

    def check(self) -> None:
        """Raise the error of a save that failed in the background, if any."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the current write has finished; raise an error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            _barrier("effscale_checkpoint_written")  # only process 0 writes the checksums
        self.check()

    def clean(self, step: int) -> None:
        """Prepare the folder for checkpoints from ``step`` on.

        Partial checkpoints of a killed run are deleted. Checkpoints newer than the restored one, and those without a
        manifest, are moved to ``set_aside/``. ``save`` calls this before the first checkpoint; until then the folder is only
        read, so you can look at a run while it is in progress.

        Raises:
            CheckpointError: The folder has checkpoints of ``step`` or later that this run neither restored nor saved.
        """
        past = self._newer_than_restored() if not self._cleaned else []
        others = [s for s in self.steps if s >= step and s not in {*self._saved, *past}]
        if others:
            raise CheckpointError(
                f"{self.folder}: already contains {_listed(others)}, which this run was not resumed from, so step {step} is not "
                "saved there. Resume from them (resume_or_start, or Checkpoints.restore), or choose another folder."
            )
        if self._cleaned:
            return
        self._cleaned = True
        if jax.process_index() == 0:
            make_folder(self.folder)
            for left in leftovers(self.folder):
                logger.warning("deleting %s, which was not finished", left)
                remove(left)
            for newer in past:
                path = step_folder(self.folder, newer)
                self._set_aside(path, f"the run continues from step {self._start}")
            for lost in without_manifest(self.folder):
                self._set_aside(lost, f"it has no {MANIFEST} and cannot be verified")
        _barrier("effscale_checkpoints_clean")

    def close(self) -> None:
        """Finish writing. Call this at the end, as the exit of Python would cut off a write."""
        self.wait()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """A context that exits only when no write is in progress; errors of the write are left for ``check``."""
        try:
            yield
        finally:
            if self._thread is not None:
                self._thread.join()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _newer_than_restored(self) -> list[int]:
        return [step for step in self.steps if self._start is not None and step > self._start]

    def _set_aside(self, source: AnyPath, reason: str) -> None:
        number = 0
        while (target := self.folder / "set_aside" / f"{source.name}.{number}").exists():
            number += 1
        logger.warning("moving %s to %s: %s", source, target, reason)
        move(source, target)

    def _finish(self, step: int, response: Any, number: int, clock: float) -> None:
        try:
            response.result()
            path = step_folder(self.folder, step)
            known = _digests(path, f"{number}/{step}") if jax.process_count() > 1 else {}
            if jax.process_index() == 0:
                write_manifest(path, known)
                remove(writing_mark(path))
        except Exception as error:
            self._saved.discard(step)
            failure = self._failure(step, error)
            failure.__cause__ = error
            # Orbax measures its timeouts with the time of day.
            was_set = isinstance(error, TimeoutError) and abs(_wall_clock() - clock) > 60
            if was_set and jax.process_count() == 1:
                logger.warning(
                    "the clock was set while the checkpoint of step %d was written; it is left out",
                    step,
                )
            else:
                self._error = failure
            return
        if jax.process_index() == 0:
            self._delete_old()

    def _delete_old(self) -> None:
        """Delete checkpoints beyond ``keep``. A failed deletion does not stop the run."""
        for old in superseded(self.folder, self.keep):
            try:
                delete_checkpoint(step_folder(self.folder, old))
            except OSError as error:
                logger.warning("the checkpoint of step %d could not be deleted: %s", old, error)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Remove the partial checkpoint and return the error."""
        path = step_folder(self.folder, step)
        if jax.process_index() == 0:
            unfinished = [] if (path / MANIFEST).exists() else [path]
            for left in [
                *unfinished,
                *self.folder.glob(f"{path.name}{TEMPORARY}*"),
                writing_mark(path),
            ]:
                with contextlib.suppress(Exception):  # the next run deletes what remains
                    remove(left)
        previous = self.latest
        kept = (
            "no earlier one exists"
            if previous is None
            else f"the checkpoint of step {previous} is intact"
        )
        if is_local(self.folder):
            free, advice = _free_space(self.folder), "Free some space, keep fewer (keep=)"
        else:
            free, advice = "the bucket was readable at the start", "Check that it is writable"
        return CheckpointError(
            f"{self.folder}: the checkpoint of step {step} could not be written ({error}); {free}; {kept}. "
            f"{advice} or choose another folder, then resume."
        )

    def _check_config(self, path: AnyPath) -> None:
        if self.config is None:
            return
        saved = read_run(path)["config"]
        if saved is None:
            return
        found = {
            name: values
            for name, values in differences(saved, self.config).items()
            if not any(name == free or name.startswith(free + ".") for free in self.free_fields)
        }
        if found:
            listed = "; ".join(
                f"{name}: {old!r} in the checkpoint, {new!r} in this run"
                for name, (old, new) in found.items()
            )
            raise CheckpointError(
                f"{path}: saved with a different config ({listed}). Resume with the saved values, or start a new run folder."
            )


def _wall_clock() -> float:
    """Return the time of day minus that of a clock that nobody sets; it changes when the time of day is set."""
    return time.time() - time.monotonic()


def _digests(path: AnyPath, name: str) -> dict[str, Any]:
    """Return the digests of a checkpoint on process 0, and nothing on the others. Each process computes a part of them."""
    part = digest_part(path, jax.process_index(), jax.process_count())
    said = collect_on_first(f"digests/{name}", json.dumps(part))
    return {name: entry for text in said if text for name, entry in json.loads(text).items()}


def _free_space(folder: AnyPath) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError as unknown:
        return f"free space unknown: {unknown}"


def _listed(steps: Sequence[int]) -> str:
    kind = "the checkpoint of step" if len(steps) == 1 else "the checkpoints of steps"
    return f"{kind} {', '.join(map(str, steps))}"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _first_problem(problem: str | None) -> str | None:
    """Return the problem of the first process that has one, the same on all processes."""
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    padded = np.frombuffer((problem or "").encode()[:512].ljust(512, b"\0"), np.uint8)
    said = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, 512)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in said]
    return next(filter(None, texts), None)


def _iterator_file() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"


def _read_iterator(path: AnyPath) -> Any:
    """Return the data position of this process. If a different number of processes saved, return the position they agree on."""
    file = path / "iterator" / _iterator_file()
    if file.is_file():
        return _decode(json.loads(file.read_text(encoding="utf-8")))
    files = sorted((path / "iterator").glob("process_*.json"))
    positions = {file.read_text(encoding="utf-8") for file in files}
    if len(positions) != 1:
        have = ", ".join(file.stem for file in files) or "none"
        differ = ", which differ" if files else ""
        raise CheckpointError(
            f"{path}: no data position for process {jax.process_index()} of {jax.process_count()} (it has: {have}{differ}). "
            "Resume with the number of processes it was saved by, or restore without a data iterator."
        )
    return _decode(json.loads(positions.pop()))


def _encode(state: Any) -> Any:
    """Return an iterator's state as JSON; the states of grain are dicts of numbers, or bytes."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"json": to_json(state)}


def _decode(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if "bytes" in value else value["json"]
