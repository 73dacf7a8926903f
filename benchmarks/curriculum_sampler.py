"""The time that a curriculum adds to reading rows, and its share of a training step.

``plain`` reads shuffled rows, and ``curriculum`` reads the same rows with two metrics, 100 percentiles and a length,
both in batches of 8 rows of 256 tokens and without prefetching. ``tables`` prepares a curriculum of 10 million ranked
samples, including checks, and draws the first batch at step 1,000,000 (also with a batch of 512). ``step`` is the
training step of the GPT-2 of ``train_step.py``.
"""

import dataclasses
import pathlib
import tempfile

from harness import main, seconds
from train_step import BATCH, LENGTH, VOCAB, effscale

ROWS, STEPS = 8192, 200


def plain() -> dict[str, float]:
    from effscale.data import packed_rows

    with tempfile.TemporaryDirectory() as folder:
        return _read(packed_rows(_store(folder), length=LENGTH))


def curriculum() -> dict[str, float]:
    from effscale.curriculum.sampler import curriculum_rows
    from effscale.data import PackedTokens

    with tempfile.TemporaryDirectory() as folder:
        rows = PackedTokens(_store(folder), LENGTH)
        return _read(curriculum_rows(rows, _difficulties(len(rows)), batch_size=BATCH))


def tables() -> dict[str, float]:
    import resource

    from effscale.curriculum.sampler import curriculum_rows

    figures, size = {}, 10_000_000
    ranked = _difficulties(size)
    # A copy checks its ranking again.
    difficulties = lambda: {name: dataclasses.replace(item) for name, item in ranked.items()}
    for batch_size in (BATCH, 512):
        build = lambda batch_size=batch_size: curriculum_rows(
            range(size), difficulties(), batch_size=batch_size
        )
        figures[f"build_{batch_size}_s"] = seconds(build, repeats=3, warmup=0)
        rows = build()
        first = batch_size * 1_000_000
        read = lambda rows=rows, first=first: rows[first]
        figures[f"step_1e6_{batch_size}_us"] = seconds(read, repeats=1, warmup=0) * 1e6
        batch = iter(range(10**6))

        def row_by_row(rows=rows, batch=batch, batch_size=batch_size):
            start = next(batch) * batch_size
            for index in range(start, start + batch_size):
                rows[index]

        figures[f"row_{batch_size}_us"] = seconds(row_by_row, repeats=200) * 1e6 / batch_size
    # Kilobytes on Linux.
    figures["peak_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return figures


def step() -> dict[str, float]:
    return effscale()


def _store(folder: str):
    import numpy as np

    from effscale.data import TokenStore
    from effscale.data.writer import TokenStoreWriter

    rng = np.random.default_rng(0)
    path = pathlib.Path(folder) / "store"
    with TokenStoreWriter(path, vocab_size=VOCAB) as writer:
        while writer.num_tokens <= ROWS * LENGTH:
            writer.add_document(rng.integers(0, VOCAB, 4 * LENGTH))
    return TokenStore.open(path)


def _difficulties(num_rows: int):
    import numpy as np

    from effscale.curriculum.ranking import rank
    from effscale.curriculum.sampler import Difficulty
    from effscale.training import LinearPacing, RootPacing

    rng = np.random.default_rng(1)
    rarity = RootPacing(min_difficulty=1, max_difficulty=100, total=STEPS, difficulty_step=1)
    length = LinearPacing(min_difficulty=100, max_difficulty=2048, total=STEPS, difficulty_step=64)
    return {
        "rarity": Difficulty(
            ranking=rank(rng.random(num_rows, np.float32)),
            pacing=rarity,
            difficulty_type="percentile",
        ),
        "length": Difficulty(ranking=rank(rng.integers(1, 2049, num_rows)), pacing=length),
    }


def _read(rows) -> dict[str, float]:
    from effscale.data import batch_rows

    batches = iter(batch_rows(rows, batch_size=BATCH, num_threads=0, prefetch=0))
    took = seconds(lambda: next(batches), repeats=4 * STEPS)
    return {"row_us": took / BATCH * 1e6, "batch_us": took * 1e6}


def report(medians: dict[str, dict[str, float]]) -> str:
    added = medians["curriculum"]["batch_us"] - medians["plain"]["batch_us"]
    share = added / (medians["step"]["step_ms"] * 1e3)
    return (
        f"the curriculum adds {added / BATCH:.1f} us per row, {added:.0f} us per batch: {share:.3%} of a step  "
        f"of {medians['step']['step_ms']:.0f} ms"
    )


if __name__ == "__main__":
    workers = {"plain": plain, "curriculum": curriculum, "tables": tables, "step": step}
    main(workers, rounds=3, report=report)
