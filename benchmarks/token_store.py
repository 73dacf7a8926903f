"""Build a token store from a large generated corpus and report the peak memory.

    python benchmarks/token_store.py --gigabytes 2

The corpus is written to a temporary folder as JSON Lines, 128 MB per file, and its store is built in a separate
process, whose peak resident memory is printed next to that of the same process after its imports. Then random rows
are read. To see that memory does not grow with the corpus, repeat the run with another ``--gigabytes``.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import string
import subprocess
import sys
import tempfile
import time

FILE_BYTES = 128_000_000


def write_corpus(folder: pathlib.Path, size: int) -> None:
    """Write documents of varied words, numbers, code and other scripts up to ``size`` bytes."""
    rng = random.Random(0)
    letters = string.ascii_lowercase + "eeeaaooiitnsrh"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(40_000)]
    words += ["".join(rng.choices("абвгдежзийклмнопрстуфхцчшщыэюя", k=6)) for _ in range(4_000)]
    words += ["".join(rng.choices("的一是不了人我在有他这中大来上国", k=3)) for _ in range(2_000)]
    # Cumulative weights of Zipf's law, which words in real text follow.
    total, cumulative = 0.0, []
    for rank in range(1, len(words) + 1):
        total += 1 / rank
        cumulative.append(total)
    rng.shuffle(words)
    written, number = 0, 0
    while written < size:
        with open(folder / f"part-{number:04d}.jsonl", "wb") as stream:
            while written < size and stream.tell() < FILE_BYTES:
                count = rng.choice((40, 200, 800, 3000))
                chosen = rng.choices(words, cum_weights=cumulative, k=count)
                for at in range(0, count, 17):
                    chosen[at] = rng.choice(("\n", "def f(x):\n    return x\n", str(rng.random())))
                line = json.dumps({"text": " ".join(chosen)}, ensure_ascii=False) + "\n"
                written += stream.write(line.encode())
        number += 1


def peak_megabytes() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(folder: pathlib.Path, vocab_size: int) -> None:
    """Build the store in the measured process."""
    from effscale.data import JsonLines, prepare_corpus

    at_start = peak_megabytes()
    source = JsonLines(paths=str(folder / "part-*.jsonl"))
    began = time.perf_counter()
    first: list[float] = []

    def progress(done):
        first or first.append(time.perf_counter())

    corpus = prepare_corpus(
        source, folder / "cache", vocab_size=vocab_size, validation_fraction=0.01, progress=progress
    )
    ended = time.perf_counter()
    stores = (corpus.train, corpus.validation)
    print(
        json.dumps(
            {
                "peak_rss_mb_after_imports": round(at_start),
                "peak_rss_mb": round(peak_megabytes()),
                "tokenizer_seconds": round(first[0] - began, 1),
                "store_seconds": round(ended - first[0], 1),
                "tokens": sum(store.num_tokens for store in stores),
                "documents": sum(store.num_documents for store in stores),
                "store_bytes": sum(
                    entry["bytes"] for store in stores for entry in store.manifest["files"].values()
                ),
                "train": str(corpus.train.folder),
            }
        )
    )


def read(folder: str, length: int, rows: int) -> None:
    """Time the first open, which verifies all checksums, a later open and random rows, in a separate process."""
    from effscale.data import PackedTokens, TokenStore

    began = time.perf_counter()
    TokenStore.open(folder)
    verified = time.perf_counter() - began
    began = time.perf_counter()
    store = TokenStore.open(folder)
    opened = time.perf_counter() - began
    packed = PackedTokens(store, length)
    order = random.Random(1).choices(range(len(packed)), k=rows)
    began = time.perf_counter()
    for index in order:
        packed[index]
    elapsed = time.perf_counter() - began
    print(
        json.dumps(
            {
                "open_ms": round(opened * 1e3, 2),
                "random_rows_per_second": round(rows / elapsed),
                "tokens_per_second_read": round(rows * length / elapsed),
                "verify_seconds": round(verified, 2),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--rows", type=int, default=20_000, help="number of random rows to read")
    parser.add_argument("--folder", default=None, help="folder for temporary files")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(pathlib.Path(options.build), options.vocab_size)
        return
    if options.read:
        read(options.read, options.length, options.rows)
        return

    def part(*arguments: str) -> dict:
        command = [sys.executable, __file__, *arguments]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    with tempfile.TemporaryDirectory(prefix="effscale-", dir=options.folder) as name:
        folder = pathlib.Path(name)
        os.environ["XDG_CACHE_HOME"] = name  # records there that the store was verified
        began = time.perf_counter()
        write_corpus(folder, int(options.gigabytes * 1e9))
        size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        print(f"corpus: {size / 1e9:.3f} GB in {time.perf_counter() - began:.0f} s", flush=True)
        built = part("--build", name, "--vocab-size", str(options.vocab_size))
        train = built.pop("train")
        built["megabytes_per_second"] = round(size / 1e6 / built["store_seconds"], 1)
        built["tokens_per_second"] = round(built["tokens"] / built["store_seconds"])
        for key, value in built.items():
            print(f"{key}: {value}", flush=True)
        rows = ("--length", str(options.length), "--rows", str(options.rows))
        for key, value in part("--read", train, *rows).items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
