"""Hugging Face data sets, from a folder or from the hub, as a corpus."""

import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.sources import fields


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """A data set of the `datasets` library; needs the extra ``hf``.

    A folder written by ``save_to_disk`` is memory-mapped; a folder of data files, or a name on the
    hub, is streamed. A folder needs no network.

    Attributes:
        name: A name on the hub, such as ``"Salesforce/wikitext"``, or a local folder.
        config: The configuration of the data set, where it has several.
        split: The split to read.
        field: The column that holds the text.
    """

    name: str | os.PathLike[str]
    config: str | None = None
    split: str = "train"
    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "name", os.fspath(self.name))
        if not self.name:
            raise ValueError("name='': give a data set's name or folder.")
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
            self._fault(skipped, "empty", where, "the data set has no rows")

    def _load(self) -> Any:
        try:
            # An extra that the type checker's environment may lack.
            import datasets  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise ImportError(
                "reading Hugging Face datasets needs datasets: "
                "install it with pip install datasets pyarrow"
            ) from error
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
                f"cannot load the Hugging Face data set {self.name!r} ({place}), "
                f"config {self.config!r}, split {self.split!r}: {error}"
            ) from error

    def _choose_split(self, splits: Any) -> Any:
        if self.split not in splits:
            raise ValueError(f"the folder has the splits {sorted(splits)}")
        return splits[self.split]

    def spec(self) -> str:
        """The source in the string form that `parse_source` reads."""
        config = f":{self.config}" if self.config else ""
        return f"hf:{self.name}{config}#{self.field}"

    def fingerprint(self) -> dict[str, Any]:
        """The names, and for a folder its files' sizes and times; a change on the hub is not seen."""
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
