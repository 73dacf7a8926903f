"""A difficulty index: the samples of a corpus in order of difficulty, in a folder that is written once.

For each metric the folder contains ``<metric>.parquet``, with a row for each sample and two columns:

- ``value``: the difficulty; int64, or double.
- ``sample``: the position of the sample in the source; int64.

sorted by (value, sample). Any tool that reads Parquet can read it. ``<metric>.values.npy`` and ``<metric>.samples.npy`` are
the same columns as NumPy arrays, which training memory-maps. ``index.json`` contains the number of samples, the
fingerprint of their source (see `fingerprint`), for each metric its smallest and largest value and every fifth percentile, and
the sizes and digests of the files.
"""

import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Shaped

from effscale.curriculum.digests import fingerprint
from effscale.curriculum.ranking import Ranking
from effscale.data.store import Verify, check_verify, manifest_digest, read_manifest
from effscale.data.verified import verify_once
from effscale.options import did_you_mean

INDEX = "index.json"
FORMAT, VERSION = "effscale-difficulty-index", 2
PERCENTILES = tuple(range(0, 101, 5))


class CorruptIndexError(RuntimeError):
    """A difficulty index is damaged: truncated, altered or incomplete.

    Attributes:
        file: The damaged file.
    """

    def __init__(self, file: pathlib.Path, expected: str, found: str):
        super().__init__(
            f"{file}: corrupt difficulty index, expected {expected}, found {found}.  "
            "Delete the folder and analyze the corpus again."
        )
        self.file = file


class DifficultyIndex:
    """Read access to a difficulty index. Create it with `open` or `analyze`.

    Attributes:
        folder: The folder of the index.
        manifest: The content of ``index.json``.
    """

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any], verify: Verify = "once"):
        self.folder, self.manifest, self._verify = folder, manifest, verify

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: Verify = "once") -> "DifficultyIndex":
        """Open an index after checking it.

        Args:
            folder: The folder of the index.
            verify: ``"once"`` compares the files' sizes with ``index.json`` immediately. It compares the digests of a metric's
                files when the metric is used, unless this machine has already done so since they last changed. ``"size"``
                never compares digests; ``"full"`` compares those of all files immediately.

        Raises:
            FileNotFoundError: The folder does not exist.
            CorruptIndexError: A file is missing, truncated or altered.
        """
        check_verify(verify)
        path = pathlib.Path(folder).absolute()
        if not path.is_dir():
            hint = "Build one with analyze"
            if shards_folder(path).is_dir():
                hint = "An unfinished analysis was found; run analyze again to finish it"
            raise FileNotFoundError(f"{path}: no difficulty index found. {hint}.")
        manifest = read_manifest(
            path / INDEX,
            FORMAT,
            VERSION,
            CorruptIndexError,
            "analyze the corpus again (with overwrite=True)",
        )
        index = cls(path, manifest, verify)
        for name in manifest["files"]:
            index._check_file(name, digest=verify == "full")
        return index

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(self.manifest["metrics"])

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return self.manifest["num_samples"]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source that was analyzed."""
        return self.manifest["source"]

    def check_source(self, source: Any) -> None:
        """Check that a source is the one that was analyzed.

        Raises:
            ValueError: It is a different source.
        """
        found = fingerprint(source)
        if found != self.fingerprint:
            raise ValueError(
                f"{self.folder}: the difficulty index was built for {self.num_samples} samples "
                f"with fingerprint {self.fingerprint}, but this source has {len(source)} samples with "
                f"fingerprint {found}. Use the source that was analyzed, or analyze this one."
            )

    def ranking(self, metric: str, source: Any = None) -> Ranking:
        """Return the samples in order of difficulty, memory-mapped.

        Args:
            metric: The name of the metric.
            source: The source to train on; if given, it is checked with `check_source`.

        Raises:
            ValueError: The metric does not exist, or the source is not the one that was analyzed.
            CorruptIndexError: The file is damaged.
        """
        entry = self._entry(metric)
        if source is not None:
            self.check_source(source)
        return Ranking(self._map(entry["samples"]), self._map(entry["values"]))

    def values(self, metric: str) -> Shaped[np.ndarray, " samples"]:
        """Return the difficulty of sample 0, 1, ...; raises the same errors as `ranking`."""
        ranking = self.ranking(metric)
        values = np.empty_like(ranking.values)
        values[ranking.samples] = ranking.values
        return values

    def percentiles(self, metric: str) -> dict[int, int | float]:
        """Return the value at every fifth percentile, from 0 (the smallest) to 100 (the largest).

        The value at percentile p is the smallest v such that at least p% of the samples are at most v.
        """
        return dict(zip(PERCENTILES, self._entry(metric)["percentiles"], strict=True))

    def _map(self, name: str) -> Shaped[np.ndarray, " samples"]:
        path = self.folder / name
        if self._verify != "size":
            promises = {"blake2b": self.manifest["files"][name]["blake2b"]}
            verify_once(path, functools.partial(self._check_file, name, digest=True), promises)
        array = np.asarray(np.load(path, mmap_mode="r"))
        if array.shape != (self.num_samples,):
            raise CorruptIndexError(path, f"{self.num_samples} rows", f"shape {array.shape}")
        return array

    def _check_file(self, name: str, *, digest: bool) -> None:
        path, entry = self.folder / name, self.manifest["files"][name]
        if not path.is_file():
            raise CorruptIndexError(path, f"bytes {entry['bytes']}", "no file")
        for key, value in describe_file(path, digest=digest).items():
            if entry[key] != value:
                raise CorruptIndexError(path, f"{key} {entry[key]}", f"{value}")

    def _entry(self, metric: str) -> dict[str, Any]:
        if metric not in self.metrics:
            raise ValueError(
                f"metric must be in the index, got {metric!r}: {did_you_mean(metric, self.metrics)}"
            )
        return self.manifest["metrics"][metric]

    def __repr__(self) -> str:
        return (
            f"DifficultyIndex({str(self.folder)!r}, metrics={self.metrics}, "
            f"num_samples={self.num_samples})"
        )


def shards_folder(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder of the finished shards during an analysis."""
    return folder.with_name(f".{folder.name}.analysis")


def describe_file(path: pathlib.Path, *, digest: bool = True) -> dict[str, Any]:
    """Return the size of a file and, by default, its digest."""
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    if digest:
        with open(path, "rb") as stream:
            hashed = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        facts["blake2b"] = hashed.hexdigest()
    return facts


def write_manifest(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Write ``index.json`` into the folder of an index."""
    paths = sorted(path for path in folder.iterdir() if path.name != INDEX)
    files = {path.name: describe_file(path) for path in paths}
    manifest = {"format": FORMAT, "version": VERSION, **content, "files": files}
    manifest["digest"] = manifest_digest(manifest)
    text = json.dumps(manifest, indent=2, allow_nan=False)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
