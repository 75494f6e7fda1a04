"""The documents say what works: README's code runs, its links lead somewhere, equations that code cites exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SUFFIXES = {".py", ".cpp", ".hpp"}
FOLDERS = ("flowfast", "kernels", "csrc", "tests")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in order and share their names, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert blocks


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_cited_equations_exist() -> None:
    numbered = {int(number) for number in re.findall(r"\*\*Eq\. (\d+)", (ROOT / "docs" / "math.md").read_text())}
    assert numbered == set(range(1, max(numbered) + 1))
    for path in SOURCES:
        for first, last in re.findall(r"\bEq\. (\d+)(?:-(\d+))?", path.read_text()):
            assert {int(first), int(last or first)} <= numbered, f"{path.name} cites Eq. {first}"
