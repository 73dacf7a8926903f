"""The corpora of experiments."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from effscale.command.terminal import status
from effscale.experiments.shared.config_parts import TextPart
from effscale.user_cache import cache_folder


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a study: one corpus, or a mixture with weights.

    Attributes:
        corpora: The ``effscale.data.Corpus`` objects; the first has the tokenizer of all.
        weights: How often each is drawn from; None draws by size.
    """

    corpora: Sequence[Any]
    weights: Sequence[float] | None = None

    @property
    def train(self) -> list[Any]:
        """The token stores to train on."""
        return [corpus.train for corpus in self.corpora]

    @property
    def validation(self) -> list[Any]:
        """The held-out token stores."""
        return [corpus.validation for corpus in self.corpora]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.corpora[0].tokenizer

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer."""
        return self.corpora[0].vocab_size

    def next_token_run(self, run: Any, config: Any) -> Any:
        """Return a run that trains on rows of the text, and evaluates on the held-out text.

        Args:
            run: The ``effscale.run.Run``; each process reads its part of the batches.
            config: Has ``length``, ``batch_size``, ``eval_every`` and ``eval_batches``.

        Raises:
            ValueError: There is too little text for a batch.
        """
        from effscale.data import make_dataset
        from effscale.parallel import batch_shard
        from effscale.parallel.placement import BatchShard
        from effscale.training import Evaluation, next_token_loss

        mesh = run.device_mesh()
        part = BatchShard(0, 1) if mesh is None else batch_shard(mesh)
        rows = {
            "length": config.length,
            "batch_size": config.batch_size,
            "process_index": part.index,
            "process_count": part.count,
        }
        train = functools.partial(make_dataset, self.train, weights=self.weights, **rows)
        held_out = functools.partial(
            make_dataset, self.validation, shuffle=False, num_epochs=1, remainder="pad", **rows
        )
        train(seed=0)  # raises if there is too little text
        return dataclasses.replace(
            run,
            data=lambda seed: train(seed=seed),
            evaluation=Evaluation(
                data=held_out,
                loss=next_token_loss,
                every=config.eval_every,
                batches=config.eval_batches,
            ),
        )

    def digests(self) -> dict[str, Any]:
        """Return digests of the text and the tokenizer, for ``config.json``."""
        return corpus_digests(self.corpora)


def prepared_corpora(
    config: TextPart,
    *,
    seed: int = 0,
    on_error: Literal["raise", "skip"] | None = None,
) -> tuple[Any, Any]:
    """Prepare the corpora that ``config.corpus`` names, or load them from the cache, and return them with their
    weights.

    Args:
        config: Config of the experiment, with ``corpus``.
        seed: Decides which documents are held out.
        on_error: What to do with a document that cannot be used; None uses the default of the source.
    """
    from effscale.data import parse_mixture, prepare_mixture

    corpus = vars(config)["corpus"]  # a field of each subclass, with its own type
    sources, weights = parse_mixture(corpus, on_error=on_error)
    with status("preparing the corpus") as progress:
        corpora = prepare_mixture(
            sources,
            config.cache or cache_folder("corpora"),
            vocab_size=config.vocab_size,
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
