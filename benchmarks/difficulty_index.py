"""Time and memory to rank a corpus by vocabulary rarity, at 10M and at 100M tokens.

    python benchmarks/difficulty_index.py
    python benchmarks/difficulty_index.py --rounds 3

Each worker writes a token store with Zipf-distributed tokens (50,257 tokens, documents of 700) to a temporary folder,
in a separate process. Then it counts the vocabulary and builds the index of rows of 1024 tokens, with two processes.
For comparison, the table has the time to read the token file once. Memory is constant if the peaks at both sizes are
similar.
"""

import functools
import multiprocessing
import pathlib
import resource
import tempfile
import time

import harness
import numpy as np

VOCABULARY, LENGTH, DOCUMENT, WORKERS = 50_257, 1024, 700, 2


def write_store(folder: pathlib.Path, num_tokens: int) -> None:
    """Write in small pieces, so that this process is smaller than every process of the analysis."""
    from effscale.data.writer import TokenStoreWriter

    rng = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    with TokenStoreWriter(folder, vocab_size=VOCABULARY) as writer:
        while writer.num_tokens < num_tokens:
            drawn = rng.random(DOCUMENT * 100) * cumulative[-1]
            for ids in np.searchsorted(cumulative, drawn).reshape(100, DOCUMENT):
                writer.add_document(ids)


def index(num_tokens: int) -> dict[str, float]:
    from effscale.curriculum.analysis.analyze import analyze, count_vocabulary
    from effscale.curriculum.metrics import VocabularyRarity
    from effscale.data import PackedTokens, TokenStore

    with tempfile.TemporaryDirectory(prefix="effscale-") as name:
        folder = pathlib.Path(name)
        maker = multiprocessing.get_context("spawn").Process(
            target=write_store, args=(folder / "store", num_tokens)
        )
        maker.start()
        maker.join()
        store = TokenStore.open(folder / "store")
        at_start = _peak(resource.RUSAGE_SELF)
        began = time.perf_counter()
        for _ in store.chunks():
            pass
        read = time.perf_counter() - began
        began = time.perf_counter()
        counts = count_vocabulary(store, VOCABULARY)
        counted = time.perf_counter() - began
        analyze(
            PackedTokens(store, LENGTH),
            {"rarity": VocabularyRarity(counts)},
            folder / "index",
            num_workers=WORKERS,
        )
        return {
            "seconds": time.perf_counter() - began,
            "seconds_to_count": counted,
            "seconds_to_read": read,
            "peak_mb_at_start": at_start,
            "peak_mb": _peak(resource.RUSAGE_SELF),
            "peak_mb_worker": _peak(resource.RUSAGE_CHILDREN),
        }


def _peak(who: int) -> float:
    """Return the peak resident memory of this process, or of the largest one that it started, in MB."""
    return resource.getrusage(who).ru_maxrss / 1024


def report(medians: dict[str, dict[str, float]]) -> str:
    rows = [
        ("tokens", "index", "of that, counting", "reading once", "peak, main", "peak, a worker")
    ]
    for name, figures in medians.items():
        rows.append(
            (
                name,
                f"{figures['seconds']:.1f} s",
                f"{figures['seconds_to_count']:.2f} s",
                f"{figures['seconds_to_read']:.2f} s",
                f"{figures['peak_mb']:.0f} MB ({figures['peak_mb_at_start']:.0f} after imports)",
                f"{figures['peak_mb_worker']:.0f} MB",
            )
        )
    return harness.table(rows)


if __name__ == "__main__":
    sizes = {"10M": 10_000_000, "100M": 100_000_000}
    harness.main(
        {name: functools.partial(index, size) for name, size in sizes.items()},
        rounds=1,
        report=report,
    )
