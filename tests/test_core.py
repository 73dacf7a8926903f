"""The wheel with its core dependencies alone: README's examples run, and what is missing is named."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from effscale.extras import EXTRAS

ROOT = pathlib.Path(__file__).resolve().parents[1]
HIDE = """
import importlib.machinery, sys
class Core(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Core
"""


def names_of(requirements, extra=""):
    parsed = [Requirement(text) for text in requirements]
    return {r for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})}


def with_dependencies(requirements):
    """The names of all distributions that these requirements install."""
    found, left = set(), list(requirements)
    while left:
        requirement = left.pop()
        for extra in ("", *requirement.extras):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                left += names_of(importlib.metadata.requires(name) or [], extra)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform
    return {name for name, _ in found}


def modules_outside(names):
    """The top-level modules that only other distributions contain."""
    modules = importlib.metadata.packages_distributions()
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    outside = {m for m, owners in modules.items() if not names & set(map(normal, owners))}
    return outside - {"effscale", "kernels_pallas"} - set(sys.stdlib_module_names)


def test_readme_runs_on_the_core_alone(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling comes with the dependency group 'dev'")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (folder,) = (tmp_path / "site").glob("*.dist-info")
    core = importlib.metadata.Distribution.at(folder).requires
    absent = modules_outside(with_dependencies(names_of(core)))
    assert {"tokenizers", "grain", "matplotlib", "safetensors", "tyro"} <= absent

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    core_blocks = [block for block in blocks if "effscale.interop" not in block]
    assert len(core_blocks) >= len(blocks) - 1 >= 5
    code = f"ABSENT = {absent}\n{HIDE}" + "".join(core_blocks)
    code += f"import effscale\nassert effscale.__file__.startswith({str(tmp_path)!r})\n"
    code += "try: effscale.interop.save_pretrained\nexcept ImportError as error: print(error)\n"
    code = code.replace("import effscale\n", "import effscale, effscale.interop\n")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = "effscale.interop.save_pretrained needs (safetensors|tokenizers): install it with pip install 'effscale[(interop|data)]'"
    assert re.search(said.replace("[", r"\[").replace("]", r"\]"), done.stdout.splitlines()[-1])


def test_each_extra_is_one_that_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = {"etils": "etils", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}
    for module, extra in EXTRAS.items():
        inside = {Requirement(text).name for text in extras[extra]}
        assert named.get(module, module) in inside, module
    for requirement in project["dependencies"]:
        assert Requirement(requirement).name not in EXTRAS
