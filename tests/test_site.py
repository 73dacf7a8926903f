"""The built site: the API reference is complete, formulas are MathML, and no page needs another host."""

import ast
import html.parser
import importlib.util
import os
import pathlib
import re
import types
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("mkdocstrings", reason="the site is built with the dependency group 'docs'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
PACKAGES = sorted([*ROOT.glob("src/effscale/*/__init__.py"), ROOT / "kernels_pallas/__init__.py"])


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


API = tool("site").API


def exported(package: str) -> list[str]:
    folder = ROOT / ("src" if package.startswith("effscale") else "") / package.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The HTML of each page by its path in the site."""
    sources = [ROOT / "README.md", ROOT / "mkdocs.yml"]
    for folder in ("docs", "experiments", "notebooks", "src", "kernels_pallas"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".py", ".ipynb")]
    newest = max(sources, key=os.path.getmtime)
    built = SITE / "index.html"
    if not built.exists() or built.stat().st_mtime < newest.stat().st_mtime:
        pytest.skip("site/ is missing or older than the sources: make docs")
    return {p.relative_to(SITE).as_posix(): p.read_text("utf-8") for p in SITE.rglob("*.html")}


def test_every_public_package_is_in_the_reference():
    public = {
        ".".join(path.parent.relative_to(ROOT).parts).removeprefix("src.") for path in PACKAGES
    }
    assert {package for package in public if exported(package)} <= API.keys()
    for package, guide in API.items():
        assert exported(package)
        assert (ROOT / guide).is_file()


@pytest.mark.parametrize("package", API)
def test_every_public_name_is_on_the_page_of_its_package(package, pages):
    page = pages[f"api/{package}.html"]
    headings = re.findall(r'<h2 id="([\w.]+)" class="doc doc-heading"', page)
    assert sorted(heading.rpartition(".")[2] for heading in headings) == sorted(exported(package))
    assert f"api/{package}.html" in pages[API[package].replace(".md", ".html")]


def test_formulas_are_mathml(pages):
    formulas = [
        formula for page in pages.values() for formula in re.findall(r"<math.*?</math>", page, re.S)
    ]
    assert len(formulas) > 100
    for formula in formulas:
        text = "".join(
            ElementTree.fromstring(formula).itertext()
        )  # raises an error where an "&" is left
        assert "\\" not in text, text
    for name, page in pages.items():
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.findall(r"arithmatex|:math:|\$\$|\\[a-z]{3,}", prose), name


class Requests(html.parser.HTMLParser):
    """The addresses that a browser fetches to show a page."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in attrs:
            self.addresses.append(attrs["src"])


def test_no_page_needs_another_host(pages):
    for name, page in pages.items():
        outside = [at for at in Requests(page).addresses if re.match(r"(https?:)?//", at)]
        assert not outside, name
    for sheet in SITE.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text("utf-8"))


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("", "see code, [page](moe.md), [lost](lost.py)"),
        (
            "https://host/effscale/",
            "see [code](https://host/effscale/blob/main/src/effscale/atomic.py), [page](moe.md), [lost](lost.py)",
        ),
    ],
)
def test_links_to_source_files_lead_to_the_repository_or_nowhere(repository, expected):
    text = "see [code](../src/effscale/atomic.py), [page](moe.md), [lost](lost.py)"
    fence = "\n```\n[a](../src/effscale/atomic.py)\n```\n"
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="docs/bloom.md"))
    files = types.SimpleNamespace(get_file_from_path=lambda path: path == "docs/moe.md")
    config = types.SimpleNamespace(extra={"repository": repository})
    made = tool("site").on_page_markdown(text + fence, page, config, files)
    assert made == expected + fence


@pytest.mark.parametrize(
    ("repository", "link"),
    [
        ("", ""),
        ("https://host/a/b", ""),
        (
            "https://github.com/a/b/",
            "\n[Open in Colab](https://colab.research.google.com/github/a/b/blob/main/notebooks/moe.ipynb)\n",
        ),
    ],
)
def test_notebooks_open_on_colab_if_the_repository_is_on_github(repository, link):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="notebooks/moe.ipynb"))
    files = types.SimpleNamespace(get_file_from_path=lambda path: None)
    config = types.SimpleNamespace(extra={"repository": repository})
    made = tool("site").on_page_markdown("# MoE\n\nText", page, config, files)
    assert made == f"# MoE\n{link}\nText"


def test_docstrings_become_markdown():
    text = """Add two
numbers. Both are
finite.

>>> 1 + 1
2

References:
    A et al., "B" (2020).
        https://example.org
    C, "D" (2021).

Example:
    >>> 2 + 2
    4
"""
    assert (
        tool("docstrings").as_markdown(text)
        == """Add two numbers.
Both are finite.

```pycon
>>> 1 + 1
2
```

**References:**

- A et al., "B" (2020).
      https://example.org
- C, "D" (2021).

Examples:
    >>> 2 + 2
    4
"""
    )
