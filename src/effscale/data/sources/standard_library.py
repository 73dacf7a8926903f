"""The Python standard library as a corpus: no download, about 11 MB of code and English."""

import hashlib
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effscale.data.documents import Document, OnError, SkipReport, Source

# Tests are mostly data rather than text, and site-packages is not part of the standard library.
_EXCLUDED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The source files of this Python's standard library and the topics of its ``help()``.

    Each source file outside the test folders is a document, and so is each topic of
    ``pydoc_data.topics``, which is English prose. Empty files, such as some ``__init__.py``, are not
    documents. The content differs a little between Python versions.

    Attributes:
        on_error: ``"skip"`` by default, as you cannot fix the standard library.

    >>> first = next(StandardLibrary().documents())
    >>> first.source
    'stdlib/__future__.py'
    """

    on_error: OnError = "skip"

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        root = _root()
        for name in _files(root):
            where = f"stdlib/{name}"
            try:
                text = (root / name).read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                self._fault(skipped, "not_utf8", where, f"not UTF-8 ({error})")
            except OSError as error:
                self._fault(skipped, "unreadable", where, f"cannot be read ({error})")
            else:
                if text and not text.isspace():
                    yield from self._accept(skipped, text, where)
        try:
            from pydoc_data import topics
        except ImportError as error:
            self._fault(skipped, "unreadable", "pydoc_data.topics", f"not installed ({error})")
        else:
            for name, text in sorted(topics.topics.items()):
                yield from self._accept(skipped, text, f"pydoc_data.topics:{name}")

    def spec(self) -> str:
        """Return the string form of the source, as `parse_source` reads it."""
        return "stdlib"

    def fingerprint(self) -> dict[str, Any]:
        """Return the Python version and the names and sizes of the files."""
        root = _root()
        digest = hashlib.blake2b(digest_size=16)
        for name in [*_files(root), _TOPICS]:
            size = (root / name).stat().st_size if (root / name).exists() else 0
            digest.update(f"{name}\0{size}\n".encode())
        return {
            "source": self.spec(),
            "python": platform.python_version(),
            "files": digest.hexdigest(),
            "on_error": self.on_error,
        }


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def _files(root: pathlib.Path) -> list[str]:
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # _sysconfigdata describes the machine that built Python; the topics are added separately, as prose.
        if not (
            _EXCLUDED.intersection(relative.parts)
            or relative.name.startswith("_sysconfigdata")
            or relative.as_posix() == _TOPICS
        ):
            names.append(relative.as_posix())
    if not names:
        raise FileNotFoundError(
            f"this Python has no library source files in {str(root)!r} (it may be zipped). "
            "Choose another corpus, such as text:GLOB."
        )
    return sorted(names)
