"""Griffe's extension that prepares docstrings for the site: examples, references and literal blocks as Markdown."""

import re
import textwrap

import griffe

REFERENCES = re.compile(r"^References:\n((?: +\S.*(?:\n|$)|\n(?= ))+)", re.MULTILINE)
PLAIN = re.compile(r"(?:(?![-*> ]).+\n?)+")
SENTENCE = re.compile(r".+?\.(?= +[A-Z`])")
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Rewrite a docstring as Markdown within Google's sections."""
    text = PLAIN.sub(_summarized, text, count=1) if PLAIN.match(text) else text
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    parts = re.split(r"^(Examples:\n(?:(?: .*)?\n?)*)", text, flags=re.MULTILINE)
    # Griffe fences examples in their section, but not elsewhere.
    parts[::2] = [EXAMPLE.sub(_fenced, part) for part in parts[::2]]
    text = REFERENCES.sub(_listed, "".join(parts))
    return re.sub(r"::\n\n( +)", r":\n\n\1", text)


def _summarized(found: re.Match[str]) -> str:
    """Put the first sentence of a paragraph on one line, because a summary shows only the first line."""
    paragraph = " ".join(found[0].split("\n")).rstrip()
    sentence = SENTENCE.match(paragraph)
    if sentence:
        paragraph = f"{sentence[0]}\n{paragraph[sentence.end() :].lstrip()}"
    return paragraph + "\n" * found[0].endswith("\n")


def _fenced(found: re.Match[str]) -> str:
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"


def _listed(found: re.Match[str]) -> str:
    lines = textwrap.dedent(found[1]).rstrip().split("\n")
    entries = [f"  {line}" if line.startswith(" ") else f"- {line}" for line in lines if line]
    return "**References:**\n\n" + "\n".join(entries) + "\n"


class Docstrings(griffe.Extension):
    """Rewrites docstrings, and shows functions that have the name of the module they are imported from."""

    def __init__(self):
        self.imported: list[tuple[griffe.Module, griffe.Alias]] = []

    def on_module_members(self, *, mod: griffe.Module, **kwargs) -> None:
        """Called by griffe for a module, before it loads the modules below it."""
        self.imported += [(mod, member) for member in mod.members.values() if member.is_alias]

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        """Called by griffe for a whole package, in which modules hide functions of the same name."""
        _rewrite(pkg)
        hidden = [
            (mod, alias) for mod, alias in self.imported if not mod.members[alias.name].is_alias
        ]
        loader.resolve_aliases(implicit=True)  # the paths of some end at the functions put here
        for mod, alias in hidden:
            target = loader.modules_collection[alias.target_path]
            found = target.final_target if target.is_alias else target
            mod.members[alias.name] = griffe.Alias(alias.name, found, parent=mod)
        self.imported.clear()


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(obj.docstring.value)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)
