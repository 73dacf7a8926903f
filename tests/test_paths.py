"""Every function that writes takes its path through ``effscale.paths``."""

import os
import pathlib

import pytest
import tokenizers

from effscale.command.line import messages
from effscale.data import StandardLibrary, prepare_corpus
from effscale.data.tokenizer import save_tokenizer
from effscale.data.writer import TokenStoreWriter
from effscale.interop import save_pretrained
from effscale.models import abstract_model, preset
from effscale.training import JsonlWriter, RunFolder

MODEL = abstract_model(preset("gpt2"))
WRITERS = {
    "JsonlWriter": JsonlWriter,
    "RunFolder": RunFolder.create,
    "TokenStoreWriter": lambda path: TokenStoreWriter(path, vocab_size=4).__enter__(),
    "prepare_corpus": lambda path: prepare_corpus(StandardLibrary(), path, vocab_size=300),
    "save_pretrained": lambda path: save_pretrained(MODEL, path),
    "save_tokenizer": lambda path: save_tokenizer(
        tokenizers.Tokenizer(tokenizers.models.BPE()), path
    ),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_bucket_does_not_become_a_local_folder(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'gs://bucket/a' must be a local path"):
        writer("gs://bucket/a")
    with pytest.raises(ValueError, match="'gs://bucket/a' must be a local path"):
        writer(pathlib.Path("gs://bucket/a"))  # as the command line gives it
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/x", "/proc/x/y", "x" * 300])
@pytest.mark.parametrize("name", ["RunFolder", "prepare_corpus"])
def test_a_place_that_cannot_be_written_to_is_a_message(name, path, capsys):
    with pytest.raises(SystemExit), messages():
        WRITERS[name](path)
    assert f"{path}: " in capsys.readouterr().err
