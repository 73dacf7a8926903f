"""Packages that effscale needs for only some of its features: which extra installs each, and what is said if it is missing."""

import importlib.util
import sys

EXTRAS = {
    "datasets": "hf",
    "datasketch": "cleaning",
    "duckdb": "data",
    "etils": "train",
    "filelock": "train",
    "fsspec": "train",
    "gcsfs": "gcs",
    "gguf": "interop",
    "gradio": "chat",
    "grain": "data",
    "jinja2": "data",
    "lm_eval": "eval",
    "matplotlib": "train",
    "orbax": "train",
    "py3langid": "cleaning",
    "pyarrow": "data",
    "qwix": "qwix",
    "ray": "ray",
    "rich": "train",
    "s3fs": "s3",
    "safetensors": "interop",
    "scipy": "train",
    "tensorboardX": "train",
    "tokenizers": "data",
    "torch": "torch",
    "transformers": "torch",
    "tyro": "cli",
    "yaml": "data",
}
"""The extra that installs a module."""


def missing(feature: str, *modules: str) -> ModuleNotFoundError:
    """Return the error that a feature raises if modules are missing.

    Args:
        feature: What needs the modules, as the beginning of a sentence.
        modules: Names of modules, which are keys of ``EXTRAS``.

    >>> raise missing("reading Parquet files", "pyarrow")
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: reading Parquet files needs pyarrow: install it with pip install 'effscale[data]'
    """
    extras = ",".join(sorted({EXTRAS[module] for module in modules}))
    what, it = " and ".join(modules), "it" if len(modules) == 1 else "them"
    text = f"{feature} needs {what}: install {it} with pip install 'effscale[{extras}]'"
    return ModuleNotFoundError(text, name=modules[0])


def require(feature: str, *modules: str) -> None:
    """Check that modules are installed, before they are imported.

    Args:
        feature: What needs the modules, as the beginning of a sentence.
        modules: Names of modules, which are keys of ``EXTRAS``.

    Raises:
        ModuleNotFoundError: Some are missing; the message names the extra to install.
    """
    if lacking := [module for module in modules if not _installed(module)]:
        raise missing(feature, *lacking)


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
