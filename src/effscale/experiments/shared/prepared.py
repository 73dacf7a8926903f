"""Setup of experiments: check the run folder, prepare the corpora, and say how to resume after a stop."""

import contextlib
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from effscale.experiments.shared.cli import StoppedBySignal
from effscale.experiments.shared.config_parts import CorporaPart, OutputPart
from effscale.experiments.shared.console import status
from effscale.user_cache import cache_folder


def check_folder(config: OutputPart, free: Sequence[str]) -> None:
    """Check that ``config.out`` is unused or, with ``config.resume``, contains a run of the same config that no
    process is writing.

    Args:
        config: Config of the experiment.
        free: Fields that may differ.

    Raises:
        ValueError: The folder has another config.
        FileExistsError: The folder contains a run and ``resume`` is not set.
        FileNotFoundError: There is no run to resume.
        LockedError: Another process is writing to the folder.
    """
    from effscale.parallel import on_first
    from effscale.training import RunFolder, check_unused
    from effscale.training.mirror import OWNER
    from effscale.training.serialize import differences, to_json

    if not config.resume:
        if config.out is not None:
            on_first(lambda: check_unused(config.out))
        return
    with RunFolder.create(config.out, resume=True) as folder:
        saved = folder.config()
    if config.mirror is None and (folder.path / OWNER).exists():
        print(
            f"warning: the copy of {folder.path} is not updated, because --mirror is not set",
            file=sys.stderr,
        )
    found = [
        f"{name}: {there!r} saved, {here!r} given"
        for name, (there, here) in differences(saved, to_json(config)).items()
        if name.partition(".")[0] not in free
    ]
    if found:
        raise ValueError(
            f"{folder.path}: has another config ({'; '.join(found)}). Resume with the saved values, or start a new run folder"
        )


def open_folder(config: OutputPart, name: str, data: Mapping[str, Any] | None = None) -> Any:
    """Create the ``RunFolder`` of a run, or open it to resume.

    Args:
        config: Config of the experiment.
        name: Name of the experiment.
        data: Digests of the run's data, as for ``RunFolder.create``.
    """
    from effscale.training import RunFolder

    return RunFolder.create(
        config.out,
        name=name,
        config=config,
        data=data,
        resume=config.resume,
        mirror=config.mirror,
    )


@contextlib.contextmanager
def resumable(folder: Any) -> Iterator[None]:
    """Context in which a stop by a signal says how to resume, and in which the run folder is released if the block fails.

    Args:
        folder: The ``RunFolder``.
    """
    try:
        yield
    except StoppedBySignal as stop:
        release(folder)
        message = f"{stop}; to resume, use --out {folder.path} --resume"
        raise StoppedBySignal(message, stop.signal) from None
    except BaseException:
        release(folder)
        raise


def release(folder: Any) -> None:
    """Close the run folder when a run has failed; a copy that cannot be completed is only a warning."""
    from effscale.training import MirrorError

    try:
        folder.close()
    except MirrorError as error:
        print(f"warning: {error}", file=sys.stderr)


def prepared_corpora(
    config: CorporaPart,
    *,
    tokenizer: pathlib.Path | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] | None = None,
) -> tuple[Any, Any]:
    """Prepare the corpora that ``config.corpus`` names, or load them from the cache, and return them with their
    weights.

    Args:
        config: Config of the experiment.
        tokenizer: A tokenizer file or its folder, to use instead of training one with ``vocab_size``.
        seed: Decides which documents are held out.
        on_error: What to do with a document that cannot be used; None uses the default of the source.
    """
    from effscale.data import parse_mixture, prepare_mixture

    sources, weights = parse_mixture(config.corpus, on_error=on_error)
    with status("preparing the corpus") as progress:
        corpora = prepare_mixture(
            sources,
            config.cache or cache_folder("corpora"),
            vocab_size=None if tokenizer else config.vocab_size,
            tokenizer=tokenizer,
            validation_fraction=config.validation_fraction,
            seed=seed,
            progress=lambda p: progress(f"{p.documents:,} documents, {p.tokens:,} tokens"),
        )
    return corpora, weights


def corpus_digests(corpora: Sequence[Any]) -> dict[str, Any]:
    """Return digests of the text of a run and its tokenizer, for ``RunFolder.create``.

    Args:
        corpora: The ``effscale.data.Corpus`` objects.
    """
    from effscale.data.tokenizer import tokenizer_digest

    def digests(store: Any) -> dict[str, Any]:
        files = store.manifest["files"]
        content = "".join(files[name]["blake2b"] for name in sorted(files))
        return {
            "documents": store.num_documents,
            "tokens": store.num_tokens,
            "digest": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
        }

    tokenizer = corpora[0].tokenizer
    found: dict[str, Any] = {
        "tokenizer": {
            "vocab_size": tokenizer.get_vocab_size(),
            "digest": tokenizer_digest(tokenizer),
        }
    }
    for corpus in corpora:
        source = ", ".join(corpus.train.manifest["metadata"]["sources"])
        found[source] = {
            "train": digests(corpus.train),
            "validation": digests(corpus.validation),
        }
    return found
