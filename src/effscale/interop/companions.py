"""The files of a model folder other than its weights: ``config.json`` and the tokenizer's files."""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import tokenizers

from effscale.atomic import atomic_file
from effscale.data.tokenizer import save_tokenizer, separator_id
from effscale.interop.folder import read_json
from effscale.interop.foreign import Fields, shown
from effscale.interop.gguf.file import GGUFFile, gguf_config
from effscale.interop.gguf.tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path, named_family
from effscale.interop.tensors import FolderError
from effscale.interop.tokenizer import check_vocabulary

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "preprocessor_config.json")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of another config.json that may contradict the written ones under other names.
STALE = (
    "torch_dtype", "quantization_config", "auto_map", "num_labels", "id2label", "label2id", "classifier_dropout",
    "n_embed", "num_attention_heads", "num_hidden_layers", "rope_scaling", "rope_theta", "rotary_pct",
    "rotary_emb_base", "partial_rotary_factor", "original_max_position_embeddings", "transformers_version",
    "_name_or_path", "head_dim", "num_experts", "num_local_experts", "clip_qkv",
)  # fmt: skip


class Companions:
    """The files that are written next to a model's weights; everything is validated on creation.

    Args:
        fields: The fields of ``config.json`` that the model defines.
        like: A folder or GGUF file whose tokenizer, chat template and other fields to copy.
        tokenizer: A tokenizer to use instead of that one.

    Raises:
        FolderError: ``like`` is not a model folder, or the tokenizer has ids for which the model has no embedding.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        like: str | os.PathLike[str] | None,
        tokenizer: tokenizers.Tokenizer | None,
    ):
        self.like = None if like is None else pathlib.Path(like)
        self.tokenizer, self.is_new = tokenizer, tokenizer is not None
        self.template: str | None = None
        inherited: dict[str, Any] = {}
        gguf = None if self.like is None else gguf_path(self.like)
        if gguf is not None:
            file = GGUFFile(gguf)
            inherited, self.like = gguf_config(file), None
            self.tokenizer = tokenizer or _tokenizer_of(file)
            if not self.is_new:
                template = file.header.metadata.get("tokenizer.chat_template")
                self.template = template if isinstance(template, str) else None
        elif self.like is not None:
            inherited = dict(read_json(self.like, "config.json"))
        _check_inherited(inherited)
        if self.is_new:
            inherited = {name: value for name, value in inherited.items() if name not in SPECIAL}
        if inherited.get("model_type", fields["model_type"]) != fields["model_type"]:
            # Size fields named as in another family could be mistaken for this family's.
            inherited = {name: inherited[name] for name in SPECIAL if name in inherited}
        self.config = dict.fromkeys(SPECIAL) | merge(inherited, fields)
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, fields.get("vocab_size"), "the tokenizer")
            if self.config["eos_token_id"] is None:
                self.config["eos_token_id"] = _end_of(self.tokenizer)

    def write(self, folder: pathlib.Path) -> None:
        """Write all files, ``config.json`` last."""
        if self.like is not None and self.like.resolve() != folder.resolve():
            for name in (*(() if self.is_new else TOKENIZER_FILES), *OTHER_FILES):
                if (self.like / name).is_file():
                    shutil.copyfile(self.like / name, folder / name)
        if self.tokenizer is not None:
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
            save_tokenizer(self.tokenizer, folder)
            end = self.config["eos_token_id"]
            first = end[0] if isinstance(end, list) else end
            settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            if first is not None and first >= 0:
                settings["eos_token"] = self.tokenizer.id_to_token(first)
            if self.template is not None:
                settings["chat_template"] = self.template
            write_json(folder / "tokenizer_config.json", settings)
        if self.is_new and (folder / "generation_config.json").is_file():
            generation = read_json(folder, "generation_config.json")
            write_json(folder / "generation_config.json", generation | _special_of(self.config))
        write_json(folder / "config.json", self.config)


def model_type_of(like: str | os.PathLike[str] | None) -> str | None:
    """Return the family that a folder's ``config.json`` names; None if it does not exist or names none."""
    if like is None or gguf_path(pathlib.Path(like)) is not None:
        return None
    family = named_family(read_json(like, "config.json"))
    return None if family is None else family.model_type


def merge(inherited: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Update the ``config.json`` of another model; label names are kept if their number fits."""
    kept = {name: value for name, value in inherited.items() if name not in STALE}
    merged = kept | {name: value for name, value in fields.items() if name != "add_pooling_layer"}
    if "rope_parameters" in fields and "max_position_embeddings" in inherited:
        # Nothing depends on it, and the published value is better than the one derived from the scaling.
        merged["max_position_embeddings"] = inherited["max_position_embeddings"]
    names = inherited.get("id2label")
    if names and len(names) == len(fields.get("id2label", {})):
        merged |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    return merged


def _check_inherited(inherited: Mapping[str, Any]) -> None:
    """Reject invalid values in those fields of another ``config.json`` that are not only copied."""
    given = Fields("the config.json of like", inherited)
    names = given.block("id2label", Fields("", {}))
    for label in names.values:
        names.text(label)
        if not label.isdecimal():
            raise FolderError(
                f"{names.where.rstrip(',')}: keys must be class numbers, got {shown(label)}"
            )
    for name in SPECIAL:
        value = inherited.get(name)
        for one in value if isinstance(value, list) and value else [value]:
            # Some files use -1 for none.
            Fields(given.where, {name: one}).whole(name, None, least=-1)


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object, completely or not at all."""
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _tokenizer_of(file: GGUFFile) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of a GGUF file; an unsupported kind is left out with a warning."""
    try:
        return gguf_tokenizer(file)
    except FolderError as error:
        warnings.warn(f"written without a tokenizer: {error}", stacklevel=5)
        return None


def _end_of(tokenizer: tokenizers.Tokenizer) -> int | None:
    try:
        return separator_id(tokenizer)
    except ValueError:
        return None


def _special_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in SPECIAL}
