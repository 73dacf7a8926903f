"""The page on models runs from top to bottom."""

import pathlib
import re

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_page(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 6
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "176,247,271,424" in printed
    assert "(2, 4, 512) (2, 4, 1) (2, 4, 64)" in printed
    assert printed.endswith("\n2\n")
