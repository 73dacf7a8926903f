"""Text to batches: sources, tokenizers, token stores, splits, packing and grain pipelines.

Call `prepare_corpus` to turn a source into token stores, and `make_dataset` to turn token stores into
batches. The parts they are built from can also be used separately.
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.atomic import DiskFullError
    from effscale.data.build import Progress, write_splits, write_store
    from effscale.data.corpus import Corpus, prepare_corpus, prepare_mixture
    from effscale.data.documents import Document, DocumentError, SkipReport, Source
    from effscale.data.encode import encode_documents
    from effscale.data.megatron import CorruptIndexedDataError, MegatronTokens
    from effscale.data.packing import PackedTokens
    from effscale.data.pipeline import batch_rows, make_dataset, packed_rows
    from effscale.data.sampling import sample_texts
    from effscale.data.shards import PackedShards, TokenShards
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
    from effscale.data.statistics import token_counts, unigram_entropy
    from effscale.data.store import CorruptTokenStoreError, TokenStore
    from effscale.data.tokenizer import (
        BLOOM_TOKENS,
        fertility,
        read_tokenizer,
        save_tokenizer,
        separator_id,
        train_tokenizer,
    )
    from effscale.data.writer import TokenStoreWriter

__all__ = [
    "BLOOM_TOKENS",
    "Corpus",
    "CorruptIndexedDataError",
    "CorruptTokenStoreError",
    "DiskFullError",
    "Document",
    "DocumentError",
    "HuggingFace",
    "JsonLines",
    "MegatronTokens",
    "PackedShards",
    "PackedTokens",
    "Parquet",
    "Progress",
    "SkipReport",
    "Source",
    "Splits",
    "StandardLibrary",
    "TextFiles",
    "TokenShards",
    "TokenStore",
    "TokenStoreWriter",
    "batch_rows",
    "encode_documents",
    "fertility",
    "make_dataset",
    "packed_rows",
    "parse_mixture",
    "parse_source",
    "prepare_corpus",
    "prepare_mixture",
    "read_tokenizer",
    "sample_texts",
    "save_tokenizer",
    "separator_id",
    "token_counts",
    "train_tokenizer",
    "unigram_entropy",
    "write_splits",
    "write_store",
]

lazy_package(__name__)
