"""MkDocs' hook: the site has the folders of the repository, so links that work there work here.

It adds the pages outside docs/, renders the notebooks as they were committed, makes the pages of the API reference,
and turns formulas into MathML.
"""

import base64
import functools
import html
import json
import posixpath
import re
from pathlib import Path
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "experiments/**/*.md")
OTHERS = (
    "docs/**/*.png",
    "docs/**/*.svg",
    "docs/tools/*.css",
    "experiments/**/*.png",
    "experiments/**/*.json",
)
NOTEBOOKS = "notebooks/*.ipynb"
# Each public package, and the page that introduces it.
API = {
    "effscale.models": "docs/models.md",
    "effscale.interop": "docs/interop.md",
    "effscale.data": "docs/data.md",
    "effscale.data.cleaning": "docs/data.md",
    "effscale.parallel": "docs/parallel.md",
    "effscale.training": "docs/training.md",
    "effscale.run": "docs/runs.md",
    "effscale.study": "docs/runs.md",
    "effscale.generation": "docs/generation.md",
    "effscale.evaluation": "docs/evaluation.md",
    "effscale.interop.harness": "docs/evaluation.md",
    "effscale.curriculum": "docs/curriculum.md",
    "effscale.ltd": "docs/random_ltd.md",
    "effscale.optim": "docs/onebit.md",
    "effscale.moe": "docs/moe.md",
    "effscale.quant": "docs/quantization.md",
    "effscale.rlhf": "docs/rlhf.md",
    "effscale.rlhf.data": "docs/rlhf.md",
    "kernels_pallas": "docs/kernels.md",
    "kernels_pallas.expert_matmul": "docs/kernels.md",
    "kernels_pallas.sign_compress": "docs/kernels.md",
}


GITHUB, COLAB = "https://github.com/", "https://colab.research.google.com/github/"


class PageFile(File):
    """A page that is made from a file of another type."""

    def is_documentation_page(self) -> bool:
        """Whether it becomes HTML."""
        return True


def on_config(config):
    """Let tables say their columns, and the folders in the navigation their pages."""
    config.markdown_extensions.append(ColumnNames())
    if repository := config.extra["repository"]:
        link = {"icon": "fontawesome/brands/git-alt", "link": repository, "name": "Repository"}
        config.extra["social"] = [link]
    for section in config.nav:
        [(title, folder)] = section.items()
        if isinstance(folder, str):
            section[title] = _pages_of(folder)
    return config


def _pages_of(folder: str) -> list:
    if folder == "api/":
        return [{package: f"api/{package}.md"} for package in API]
    if folder == "notebooks/":
        return re.findall(r"\((notebooks/\w+\.ipynb)\)", (ROOT / "README.md").read_text("utf-8"))
    # In the order of the folder's page; a page in a folder below another is listed after it.
    linked = re.findall(r"\]\((\w+/README\.md)\)", (ROOT / folder / "README.md").read_text("utf-8"))
    pages = [posixpath.join(folder, page) for page in dict.fromkeys(linked)]
    below = {page: _names(f"{posixpath.dirname(page)}/*/**/README.md") for page in pages}
    names = [name for page in pages for name in (page, *below[page])]
    return [{"All experiments": f"{folder}README.md"}, *({_title(name): name} for name in names)]


def _title(page: str) -> str:
    """A page's heading, without the name of its folder."""
    heading = _heading(page)
    name, _, rest = heading.partition(": ")
    return rest[0].upper() + rest[1:] if rest and name in page.split("/") else heading


def _heading(page: str) -> str:
    return re.search(r"^# (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)[1]


def _names(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def on_files(files, config):
    """Take the files from the root of the repository instead of docs/."""
    found = [file for file in files if file.src_dir != config.docs_dir]  # those of the theme
    page = functools.partial(PageFile.generated, config)
    for name in sorted({name for pattern in (*PAGES, *OTHERS) for name in _names(pattern)}):
        found.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for name in _names(NOTEBOOKS):
        text, images = notebook_as_markdown(ROOT / name)
        found.append(page(name, content=text))
        found += [File.generated(config, image, content=data) for image, data in images.items()]
    license_text = (ROOT / "LICENSE").read_text("utf-8")
    found.append(page("LICENSE", content=f"# License\n\n```text\n{license_text}\n```\n"))
    for package, guide in API.items():
        text = f"# {package}\n\nGuide: [{_heading(guide)}](../{guide})\n\n::: {package}\n"
        found.append(File.generated(config, f"api/{package}.md", content=text))
    return Files(found)


def notebook_as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with the outputs that were committed with it.

    Args:
        path: The notebook.

    Returns:
        The Markdown, and its images by their paths in the site.
    """
    texts, images = [], {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["id"] == "install":  # of use only to those who run the notebook
            continue
        source = "".join(cell["source"])
        texts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                image = f"{path.stem}/{len(images) + 1}.png"
                images[f"notebooks/{image}"] = base64.b64decode("".join(data["image/png"]))
                texts.append(f"![Figure {len(images)} of this notebook]({image})")
            else:
                said = "".join(output.get("text", data.get("text/plain", "")))
                texts.append(f"```{{ .text .output .no-copy }}\n{said.rstrip()}\n```")
    return "\n\n".join(texts), images


def on_page_markdown(markdown, page, config, files):
    """Link pages to the API, notebooks to Colab, and source files to the repository or nowhere."""
    repository = config.extra["repository"].rstrip("/")
    if page.file.src_uri.endswith(".ipynb") and repository.startswith(GITHUB):
        address = f"{COLAB}{repository.removeprefix(GITHUB)}/blob/main/{page.file.src_uri}"
        heading, rest = markdown.split("\n", 1)
        markdown = f"{heading}\n\n[Open in Colab]({address})\n{rest}"
    packages = [package for package, guide in API.items() if guide == page.file.src_uri]
    if packages:
        links = [f"[`{package}`](../api/{package}.md)" for package in packages]
        markdown += f"\n\n## API reference\n\n{', '.join(links)}\n"
    folder = posixpath.dirname(page.file.src_uri)

    def outside(found: re.Match[str]) -> str:
        text, target = found["text"], found["target"]
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if files.get_file_from_path(path) or not (ROOT / path).exists():
            return found[0]  # a page of the site, or a broken link, which MkDocs reports
        return f"[{text}]({repository}/blob/main/{path})" if repository else text

    link = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [link.sub(outside, part) for part in parts[::2]]
    return "".join(parts)


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content, page, **kwargs):
    """Turn formulas into MathML, which browsers show without a script."""
    if page.file.src_uri.startswith("api/"):  # its table of contents has the public names only
        for heading in page.toc:
            for name in heading.children:
                name.children = []
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    # latex2mathml knows split and not aligned, which means the same, and leaves \_ within \text as it is.
    formula = html.unescape(found[2]).strip().replace("{aligned}", "{split}")
    return convert(formula, display=display).replace(r"\_", "_")


def on_post_page(output, **kwargs):
    """Let code in tables break after punctuation."""
    code = re.compile(r"(?<=<code>).*?(?=</code>)")
    return re.sub(
        r"<table>.*?</table>",
        lambda table: code.sub(
            lambda found: re.sub(r"([(,./=_])(?=\w)", r"\1<wbr>", found[0]), table[0]
        ),
        output,
        flags=re.DOTALL,
    )


class ColumnNames(Extension):
    """Gives each cell of a table the name of its column, for narrow screens (style.css)."""

    def extendMarkdown(self, md):
        """Called by Markdown."""
        md.treeprocessors.register(_ColumnNames(md), "column_names", 0.5)


class _ColumnNames(Treeprocessor):
    def run(self, root: ElementTree.Element) -> None:
        for table in root.iter("table"):
            names = ["".join(head.itertext()) for head in table.iter("th")]
            for row in table.iter("tr"):
                for cell, name in zip(row.findall("td"), names, strict=False):
                    cell.set("data-label", name)
