"""Text to batches: sources, tokenizers, token stores, splits, packing and grain pipelines.

Call `prepare_corpus` to turn a source into token stores, and `make_dataset` to turn token stores into
batches. The parts they are built from can also be used separately.
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.atomic import DiskFullError
    from effscale.data.build import write_splits, write_store
    from effscale.data.corpus import prepare_corpus, prepare_mixture
    from effscale.data.documents import Document, DocumentError, SkipReport
    from effscale.data.megatron import MegatronTokens
    from effscale.data.packing import PackedTokens
    from effscale.data.pipeline import batch_rows, make_dataset, packed_rows
    from effscale.data.shards import TokenShards
    from effscale.data.sources import (
        HuggingFace,
        JsonLines,
        Parquet,
        StandardLibrary,
        TextFiles,
        parse_mixture,
        parse_source,
    )
    from effscale.data.splits import Splits
    from effscale.data.statistics import unigram_entropy
    from effscale.data.store import TokenStore
    from effscale.data.tokenizer import BLOOM_TOKENS, fertility, read_tokenizer, train_tokenizer

__all__ = [
    "BLOOM_TOKENS",
    "DiskFullError",
    "Document",
    "DocumentError",
    "HuggingFace",
    "JsonLines",
    "MegatronTokens",
    "PackedTokens",
    "Parquet",
    "SkipReport",
    "Splits",
    "StandardLibrary",
    "TextFiles",
    "TokenShards",
    "TokenStore",
    "batch_rows",
    "fertility",
    "make_dataset",
    "packed_rows",
    "parse_mixture",
    "parse_source",
    "prepare_corpus",
    "prepare_mixture",
    "read_tokenizer",
    "train_tokenizer",
    "unigram_entropy",
    "write_splits",
    "write_store",
]

lazy_package(__name__)
