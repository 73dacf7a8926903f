"""Memory to set up a curriculum from a difficulty index, and to pass its rows to a worker process.

    python benchmarks/curriculum_memory.py

Indexes of 10 and of 100 million samples are built in a separate process, in a temporary folder (2.4 GB). Then a new
process opens the index, checks the ranking, sets up the curriculum with 100 percentiles and draws the first batch.
The table has the time and the maximum growth of memory: ``anonymous`` is memory that the machine must have;
``mapped`` are pages of files, which processes share and the system can reclaim. Then the rows are pickled and read in
a worker process.
"""

import functools
import multiprocessing
import os
import pathlib
import pickle
import tempfile
import threading
import time

import numpy as np
from harness import main, table

BATCH, BATCHES = 512, 200


class Numbers:
    """Rows of one number each, created on demand."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return {name: values[0] for name, values in self.rows(index, index + 1).items()}

    def rows(self, start: int, stop: int):
        """Return whole ranges, as ``analyze`` reads them."""
        return {"number": np.arange(start, stop) * 2_654_435_761 % 2**32}


def number(batch):
    return batch["number"]


def make_index(folder: pathlib.Path, size: int) -> None:
    from effscale.curriculum import analyze

    analyze(Numbers(size), {"number": number}, folder, batch_size=1 << 16)


def resident(kind: str) -> float:
    """Return the resident memory of this process, in MB: ``Anon`` or ``File``."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(f"Rss{kind}"))
    return kilobytes * 1024 / 1e6


class Peaks(threading.Thread):
    """Measures the maximum growth of resident memory within a block, sampled every few milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begin = {kind: resident(kind) for kind in ("Anon", "File")}
        self.peaks, self.stopped = dict.fromkeys(self.begin, 0.0), threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stopped.wait(0.003):
            self.look()

    def look(self) -> None:
        """Take one sample."""
        for kind, begin in self.begin.items():
            self.peaks[kind] = max(self.peaks[kind], resident(kind) - begin)

    def __enter__(self):
        self.start()
        return self.peaks

    def __exit__(self, *_):
        self.stopped.set()
        self.join()
        self.look()


def work(pickled: bytes, queue) -> None:
    """Receive the rows and read them, in a worker process."""
    import effscale.curriculum.sampler

    assert effscale.curriculum.sampler
    with Peaks() as peaks:
        rows = pickle.loads(pickled)
        for index in range(BATCH * BATCHES):
            rows[index]
    queue.put(peaks)


def set_up(size: int) -> dict[str, float]:
    from effscale.curriculum import Difficulty, curriculum_rows
    from effscale.curriculum.index import DifficultyIndex
    from effscale.training import LinearPacing

    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="effscale-") as name:
        os.environ["XDG_CACHE_HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = name
        folder = pathlib.Path(name) / "index"
        maker = spawn.Process(target=make_index, args=(folder, size))
        maker.start()
        maker.join()
        began = time.perf_counter()
        with Peaks() as peaks:
            difficulty = Difficulty(
                ranking=DifficultyIndex.open(folder).ranking("number"),
                pacing=LinearPacing(
                    min_difficulty=1, max_difficulty=100, total=10_000, difficulty_step=1
                ),
                difficulty_type="percentile",
            )
            rows = curriculum_rows(range(size), difficulty, batch_size=BATCH)
            rows[0]
        seconds = time.perf_counter() - began
        pickled, queue = pickle.dumps(rows._source), spawn.Queue()
        worker = spawn.Process(target=work, args=(pickled, queue))
        worker.start()
        at_work = queue.get()
        worker.join()
        return {
            "seconds": seconds,
            "anonymous_mb": peaks["Anon"],
            "mapped_mb": peaks["File"],
            "pickled_mb": len(pickled) / 1e6,
            "worker_anonymous_mb": at_work["Anon"],
            "worker_mapped_mb": at_work["File"],
        }


def report(medians: dict[str, dict[str, float]]) -> str:
    head = (
        "samples",
        "set-up",
        "anonymous",
        "mapped",
        "pickled",
        "worker, anonymous",
        "worker, mapped",
    )
    rows = [head]
    for name, figures in medians.items():
        seconds, *sizes = figures.values()
        rows.append((name, f"{seconds:.1f} s", *(f"{size:,.3g} MB" for size in sizes)))
    return table(rows)


if __name__ == "__main__":
    sizes = {"10M": 10_000_000, "100M": 100_000_000}
    main(
        {name: functools.partial(set_up, size) for name, size in sizes.items()},
        rounds=1,
        report=report,
    )
