"""Sources of documents: one frozen dataclass per kind of corpus, each with a ``documents()`` method."""

from effscale.data.sources.hugging_face import HuggingFace
from effscale.data.sources.json_lines import JsonLines
from effscale.data.sources.parquet import Parquet
from effscale.data.sources.parse import parse_mixture, parse_source
from effscale.data.sources.standard_library import StandardLibrary
from effscale.data.sources.text_files import TextFiles

__all__ = [
    "HuggingFace",
    "JsonLines",
    "Parquet",
    "StandardLibrary",
    "TextFiles",
    "parse_mixture",
    "parse_source",
]
