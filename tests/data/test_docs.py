import pathlib
import re

from effscale.data.sources import standard_library

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A sixth of the library, for the sake of time.
    files = standard_library._files
    monkeypatch.setattr(standard_library, "_files", lambda root: files(root)[::6])
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "unigram entropy: " in printed
    assert "Counter({'missing_field': 1})" in printed
