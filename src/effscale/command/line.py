"""The command line of a program: a preset, then any field of its config, and messages instead of tracebacks."""

import contextlib
import ctypes
import difflib
import inspect
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from effscale.options import did_you_mean
from effscale.parallel import ending_together
from effscale.parallel.peers import is_broken_connection
from effscale.training.errors import StoppedBySignal
from effscale.training.saved import config_from_json

Config = TypeVar("Config")


EXIT_STATUS = """Exit status: 0 on success, 2 after an error message, 143 if SIGTERM and 130 if Ctrl-C stopped the run, 75 if another process
of the run is gone. A run that is stopped during training saves first; use --out FOLDER --resume to continue it. A second Ctrl-C stops
immediately."""


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """End the program with a message instead of a traceback if the message is all that a user needs.

    This applies to errors that this library raises itself, which say what is wrong and what to do (exit status 2); to
    a run that was stopped (exit status 130 or 143); and to a process that has lost another process of the run (see
    ``ending_together``). Errors from anywhere else keep their traceback. With ``EFFSCALE_TRACEBACK=1`` in the
    environment, all errors do.
    """
    keep_tracebacks = bool(os.environ.get("EFFSCALE_TRACEBACK"))
    with (
        contextlib.nullcontext() if keep_tracebacks else _without_orbax_tracebacks(),
        ending_together("start all processes again with --out FOLDER --resume to continue"),
    ):
        try:
            yield
        except StoppedBySignal as stop:
            print(stop, file=sys.stderr)
            raise SystemExit(stop.status) from None
        except KeyboardInterrupt:
            if keep_tracebacks:
                raise
            print(
                "interrupted; to resume from the last checkpoint, use --out FOLDER --resume",
                file=sys.stderr,
            )
            raise SystemExit(128 + signal.SIGINT) from None
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if out_of_device_memory(error) and not keep_tracebacks:
                print(
                    f"error: a device has too little memory ({str(error).splitlines()[0]}). Use smaller batches, more micro-batches (accumulate), "
                    "more recomputation (remat), more devices (mesh), or a smaller model",
                    file=sys.stderr,
                )
                raise SystemExit(2) from None
            known = _raised_here(error) and not is_broken_connection(error)
            if keep_tracebacks or not known:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def out_of_device_memory(error: Exception) -> bool:
    """Return whether a device has too little memory for a program; a full disk, too, is RESOURCE_EXHAUSTED in some libraries."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def _without_orbax_tracebacks() -> Iterator[None]:
    """Keep Orbax from logging a traceback for each thread in which a write failed; the failure also raises a CheckpointError."""

    def accept(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in pathlib.Path(record.pathname).parts)

    logger = logging.getLogger("absl")
    logger.addFilter(accept)
    try:
        yield
    finally:
        logger.removeFilter(accept)


def parse(
    presets: Mapping[str, Config],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    name: str | None = None,
) -> Config:
    """Parse a command line into a config.

    ``--preset NAME`` chooses the config to start from; every other option replaces a field. Nested fields are written
    with dots: ``--model.num-layers 8``. Without a preset, ``--out FOLDER --resume`` starts from the config of that
    run; otherwise the start is ``default``.

    Args:
        presets: Configs of one class by name; must include ``default``.
        description: Text for ``--help``.
        argv: Arguments of the command line; None uses those of the program.
        name: Name of the program, for ``--help``.

    Returns:
        The config.

    Raises:
        SystemExit: On ``--help``, and on an invalid option (status 2), after printing what to do.
    """
    import tyro  # slow to import, and only the command line needs it

    words = list(sys.argv[1:] if argv is None else argv)
    chosen, words = _take(words, "--preset")
    if chosen is not None and chosen not in presets:
        _refuse(f"--preset {chosen!r}: {did_you_mean(chosen, presets)}")
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], ["--preset"], cutoff=0.85)
        if near and word not in near:
            _refuse(f"unrecognized option {word}: did you mean --preset NAME?")
    config = presets[chosen or "default"]
    if chosen is None and "--resume" in words:
        config = _saved(config, _take(words, "--out")[0])
    shown = "\n\n".join(
        [
            description.strip(),
            f"--preset NAME starts from one of: {', '.join(presets)}.",
            EXIT_STATUS,
        ]
    )
    _own_fields_first(type(config))
    try:
        return tyro.cli(type(config), default=config, args=words, description=shown, prog=name)
    except ValueError as error:  # a config with invalid values
        _refuse(str(error))


def _own_fields_first(kind: type) -> None:
    """Put a config's own fields before those of its parts, for the order in ``--help``; dataclasses have the opposite order."""
    owners = [inspect.get_annotations(owner) for owner in kind.__mro__]
    fields = vars(kind)["__dataclass_fields__"]
    place = lambda name: max(i for i, names in enumerate(owners) if name in names)
    for name in sorted(fields, key=place):
        fields[name] = fields.pop(name)


def _take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the last value of ``option`` in the words (None if it is absent), and the words without it."""
    value, rest, coming = None, [], iter(words)
    for word in coming:
        if word == option:
            value = next(coming, "")
        elif word.startswith(option + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _saved(default: Config, folder: str | None) -> Config:
    """Return the config of the run in ``folder``; without a folder the default, whose check reports the missing folder."""
    if not folder:
        return default
    from effscale.training.run_folder import check_resumable

    file = pathlib.Path(folder) / "config.json"
    try:
        check_resumable(folder)
        values = json.loads(file.read_text(encoding="utf-8"))["config"]
        return config_from_json(type(default), values)
    except FileNotFoundError as error:
        _refuse(str(error))
    except (ValueError, KeyError, TypeError) as error:
        _refuse(f"{file}: cannot resume from it: {error}")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _raised_here(error: BaseException) -> bool:
    """Return whether the innermost frame of an error's traceback belongs to this library."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    package = (
        "" if frame is None else frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    )
    return package in ("effscale", "kernels_pallas", "__main__")


def keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the kernel; applies to the whole process.

    XLA's CPU backend allocates temporaries at each step. Memory that comes fresh from the kernel causes a fault for
    each page, which takes about 5 percent of a small training step. Does nothing if the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # numbers from malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)  # allocate large blocks on the heap, which is kept
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_arena_max, 1)  # the heaps of threads are too small for large blocks
    except (OSError, AttributeError):
        pass
