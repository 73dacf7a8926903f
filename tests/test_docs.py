"""What the pages say: their examples run, their links lead somewhere, their lists are complete."""

import ast
import collections
import contextlib
import functools
import io
import itertools
import json
import pathlib
import re
import sys
import tokenize

import pytest
from flax import nnx

import effscale
from effscale.data import train_tokenizer
from effscale.data.sources import standard_library
from effscale.experiments.lab_book import rendered
from effscale.interop import save_pretrained
from effscale.models import Transformer, llama
from effscale.options import did_you_mean

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("experiments/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ],
)
NAME = lambda path: str(path.relative_to(ROOT))


@functools.cache
def text_of(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors that GitHub and mkdocs give to headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The first line of a block that the tests cannot run; readers see the reason, too.
NOT_RUN = re.compile(r"# Not run by the tests: \S+")


def save_a_model(folder: str) -> None:
    """Save what readers put in the place of FOLDER: a small Llama and its tokenizer."""
    tokenizer = train_tokenizer(
        ["a b c d e f g h"] * 50, vocab_size=270, special_tokens=["<|endoftext|>"]
    )
    model = llama(num_layers=2, d_model=32, num_heads=2, d_ff=64, vocab_size=270)
    save_pretrained(Transformer(model, rngs=nnx.Rngs(0)), folder, tokenizer=tokenizer)


class Example:
    """A Python block of a page: its program, and the comments behind its statements, by line of the page."""

    def __init__(self, page: pathlib.Path, block: re.Match) -> None:
        before = text_of(page)[: block.start(1)].count("\n")
        self.tree = ast.increment_lineno(ast.parse(block[1]), before)
        tokens = tokenize.generate_tokens(io.StringIO(block[1]).readline)
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self.comments = {before + token.start[0]: token.string[1:].strip() for token in comments}
        # A comment that begins its line, directly below a print, also says what is printed.
        alone = {before + t.start[0] for t in comments if t.line.lstrip().startswith("#")}
        prints = [node for node in ast.walk(self.tree) if self._prints(node)]
        ends = {node.lineno: node.end_lineno for node in prints}
        below = {line: end + 1 for line, end in ends.items() if {end + 1} <= alone}
        self.promised = {
            line: self.comments.get(end, self.comments.get(below.get(line)))
            for line, end in ends.items()
        }
        self.other = self.comments.keys() - {*ends.values(), *below.values()}

    @staticmethod
    def _prints(node: ast.AST) -> bool:
        call = node.value if isinstance(node, ast.Expr) else None
        return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"


def is_printed(promised: str, printed: list[str]) -> bool:
    """Whether a comment says what a line printed; CONTRIBUTING.md has the rules."""
    said = ", then ".join(dict.fromkeys(" ".join(text.split()) for text in printed))
    if promised.startswith("about "):
        return float(said) == pytest.approx(float(promised.split()[1].rstrip(":")), rel=0.02)
    start, elided, _ = promised.partition("...")
    return (
        said.startswith(start) if elided else promised == said or promised.startswith(said + ": ")
    )


EXAMPLES = {
    page: [
        Example(page, block)
        for block in BLOCK.finditer(text_of(page))
        if not NOT_RUN.match(block[1])
    ]
    for page in PAGES
    if BLOCK.search(text_of(page))
}


@pytest.mark.parametrize("page", EXAMPLES, ids=NAME)
def test_the_examples_run_from_top_to_bottom_and_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A sixth of the library is corpus enough, for the sake of time.
    files = standard_library._files
    monkeypatch.setattr(standard_library, "_files", lambda root: files(root)[::6])
    if '"FOLDER"' in text_of(page):
        save_a_model("FOLDER")
    printed = collections.defaultdict(list)

    def recorded(*values, sep=" ", **_):
        printed[sys._getframe(1).f_lineno].append(sep.join(map(str, values)))

    names: dict[str, object] = {"__name__": NAME(page), "print": recorded}
    assert EXAMPLES[page]
    for example in EXAMPLES[page]:
        exec(compile(example.tree, NAME(page), "exec"), names)
        for line, promised in example.promised.items():
            if promised is not None and line in printed:
                assert is_printed(promised, printed[line]), f"{NAME(page)}:{line}: {printed[line]}"


def test_a_comment_that_is_a_value_stands_behind_a_print():
    for page, examples in EXAMPLES.items():
        for example in examples:
            for line in example.other:
                with contextlib.suppress(SyntaxError, ValueError):
                    value = ast.literal_eval(example.comments[line])
                    assert isinstance(value, str), f"{NAME(page)}:{line} is not compared: {value}"


@pytest.mark.parametrize(
    ("promised", "printed", "right"),
    [
        ("3", ["3"], True),
        ("3", ["4"], False),
        ("1 2: two numbers", ["1 2"], True),
        ("12", ["1"], False),
        ("{'a': 1}", ["{'a': 1}"], True),
        ("True, then False", ["True", "True", "False"], True),
        ("True", ["True", "False"], False),
        ("about 31.9: scales are sent as well", ["31.87"], True),
        ("about 31.9", ["29.0"], False),
        ("the first three of ...", ["the first three of\nmany"], True),
    ],
)
def test_comments_are_compared_with_what_is_printed(promised, printed, right):
    assert is_printed(promised, printed) == right


def test_every_fence_of_python_is_one_that_is_run():
    for page in PAGES:
        fences = re.findall(r"^\s*```+ *py.*$", text_of(page), re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(text_of(page))), f"{NAME(page)}: {set(fences)}"


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{NAME(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there), did_you_mean(anchor, anchors(there))


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_what_was_measured_is_what_was_committed(page):
    assert text_of(page) == rendered(page, ROOT / "experiments"), (
        f"{NAME(page)} is not what its results say; `python -m effscale.experiments.lab_book` writes it"
    )


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("experiments/*/README.md")), ids=lambda path: path.parent.name
)
def test_conclusions_have_no_number_of_their_own(page):
    text = text_of(page)
    assert {"results.json", "config.json"} <= {path.name for path in page.parent.iterdir()}
    said = re.search(r"^## Answer\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert said, f"{NAME(page)} has no section 'Answer'"
    by_hand = re.findall(r"\d+\.\d+(?! ?%?<!--|\.?\d)|\d+ %(?!<!--)", said[1])
    assert not by_hand, f"{NAME(page)}: mark these numbers with the figure they are: {by_hand}"


def test_pages_name_no_place_outside_the_repository():
    for page in PAGES:
        found = re.findall(r"(?:/tmp|/root|/home|/work|\.\./shared)\b\S*", text_of(page))
        assert not found, f"{NAME(page)} names {found}"


def test_every_page_is_listed():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    index, site = text_of(ROOT / "docs" / "index.md"), (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r"\((\w+\.md)\)", index)) == pages - {"index.md"}
    assert set(re.findall(r": docs/(\w+\.md)", site)) == pages


def links_of(page: pathlib.Path) -> set[pathlib.Path]:
    """Where a page or the text of a notebook leads to in the repository."""
    text = text_of(page)
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^```.*?^```|`[^`\n]+`(?!\])", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s#]+)", text)
    return {(page.parent / target).resolve() for target in targets if ":" not in target}


def test_every_page_and_notebook_can_be_reached_from_the_readme():
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    reached, next_ones = set(), {ROOT / "README.md"}
    while next_ones:
        reached |= next_ones
        texts = [page for page in next_ones if page.suffix in (".md", ".ipynb")]
        next_ones = set().union(*map(links_of, texts)) - reached
    missing = reached - {path for path in reached if path.exists()}
    assert not missing, f"these files are linked and do not exist: {sorted(map(NAME, missing))}"
    dead_ends = {*PAGES, *notebooks} - reached
    assert not dead_ends, f"no page leads to {sorted(map(NAME, dead_ends))}"


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    texts = [*map(text_of, PAGES), (ROOT / ".ci" / "run").read_text(), makefile]
    named = {name for text in texts for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)}
    assert {"demo", "test"} <= named <= targets


def test_every_experiment_has_a_page_and_presets():
    import importlib

    for page in (ROOT / "experiments").glob("*/README.md"):
        name = page.parent.name
        tool = "effscale.plan.config" if name == "scale" else f"effscale.experiments.{name}"
        module = importlib.import_module(tool)
        assert {"smoke", "default", "paper"} <= module.PRESETS.keys()
        assert f"({name}/README.md)" in text_of(ROOT / "experiments" / "README.md")


def test_the_readme_of_the_package_has_no_link_that_an_index_page_cannot_follow():
    import tomllib

    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"][
        "hooks"
    ]
    text = text_of(ROOT / "README.md")
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) >= 10
    assert [target for target in targets if not target.startswith("https://")] == []
    assert re.findall(r"<!--|!\[", text) == []
    assert "\nWhen to use which technique has" in text  # the text of a link stays


def test_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) < 150


def test_the_changelog_knows_this_version_or_is_ahead_of_it():
    changelog = text_of(ROOT / "CHANGELOG.md")
    assert f"## {effscale.__version__}" in changelog or "## Unreleased" in changelog


def test_every_dependency_has_its_reason():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, page = settings["project"], text_of(ROOT / "docs" / "dependencies.md")
    rows = re.findall(r"^\| ([\w-]+) \| (.+?) \|", page, re.MULTILINE)
    reasons = {name for name, reason in rows if reason.strip()}
    extras = project["optional-dependencies"]
    main = itertools.chain(
        project["dependencies"], *(extras[e] for e in ("train", "data", "interop", "cli"))
    )
    named = {re.match(r"[\w-]+", requirement).group() for requirement in main}
    assert named - {"effscale"} == reasons - {"package", "extra", "group"}
    for name in [*extras, *settings["dependency-groups"]]:
        assert re.search(rf"^\| .*`{name}`.* \|", page, re.MULTILINE)
