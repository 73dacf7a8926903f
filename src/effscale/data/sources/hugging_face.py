"""Hugging Face datasets, from a folder or from the Hub, as a corpus."""

import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.sources import fields
from effscale.extras import require


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """A dataset of the `datasets` library; needs the extra ``hf``.

    A folder written by ``save_to_disk`` is memory-mapped; a folder of data files or a dataset on the
    Hub is streamed. A folder needs no network.

    Attributes:
        name: A name on the Hub, such as ``"Salesforce/wikitext"``, or a local folder.
        config: The configuration of the dataset, if it has several.
        split: The split to read.
        field: The column that contains the text.
    """

    name: str | os.PathLike[str]
    config: str | None = None
    split: str = "train"
    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "name", os.fspath(self.name))
        if not self.name:
            raise ValueError("name must be the name or folder of a dataset, got ''")
        fields.check(self.field)

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        rows = 0
        for rows, record in enumerate(self._load(), start=1):
            where = f"{self.name}[{self.split}]:row {rows}"
            if self.field not in record:
                self._fault(skipped, "missing_field", where, fields.missing(self.field, record))
            else:
                yield from self._accept(skipped, record[self.field], where)
        if not rows:
            where = f"{self.name}[{self.split}]"
            self._fault(skipped, "empty", where, "the dataset has no rows")

    def _load(self) -> Any:
        require("reading Hugging Face datasets", "datasets")
        # An extra that the type checker's environment may lack.
        import datasets  # pyrefly: ignore[missing-import]

        folder = pathlib.Path(self.name)
        try:
            if (folder / "dataset_dict.json").exists():
                return self._choose_split(datasets.load_from_disk(str(folder)))
            if (folder / "state.json").exists():
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(
                str(self.name), self.config, split=self.split, streaming=True
            )
        except (OSError, ValueError) as error:
            place = "folder" if folder.is_dir() else "name (no such local folder)"
            raise ValueError(
                f"cannot load the Hugging Face dataset {self.name!r} ({place}), "
                f"config {self.config!r}, split {self.split!r}: {error}"
            ) from error

    def _choose_split(self, splits: Any) -> Any:
        if self.split not in splits:
            raise ValueError(f"the folder has the splits {sorted(splits)}")
        return splits[self.split]

    def spec(self) -> str:
        """Return the string form of the source, as `parse_source` reads it."""
        config = f":{self.config}" if self.config else ""
        return f"hf:{self.name}{config}#{self.field}"

    def fingerprint(self) -> dict[str, Any]:
        """Return the names and, for a folder, the sizes and times of its files; changes on the Hub are not detected."""
        folder = pathlib.Path(self.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "source": self.spec(),
            "split": self.split,
            "files": [
                [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
                for path in files
            ],
            "on_error": self.on_error,
        }
