"""The documents name files, definitions and sections that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
MAP = [ARCHITECTURE, *DECISIONS]


def _name(path: Path) -> str:
    return path.name


def _is_path(code: str) -> bool:
    return re.fullmatch(r"[\w*-][\w.*/-]*", code) is not None and (
        "/" in code or code.endswith((".py", ".md", ".yaml", ".toml", ".sh"))
    )


def _absent(line: str) -> set[str]:
    """Paths in a line that are not there. In a row of the tree's tables they may go on from the row's first one."""
    paths = [code for code in re.findall(r"`([^`]+)`", line) if _is_path(code)]
    starts = [ROOT]
    if line.startswith("| `"):
        bases = [ROOT, ROOT / "generation", ROOT / "neurons"]
        starts += [start for base in bases for start in (base, base / paths[0], (base / paths[0]).parent)]
    return {path for path in paths if not any(any(start.glob(path.rstrip("/"))) for start in starts)}


def _defined(path: Path) -> set[str]:
    """Functions, classes and constants as ``name`` and ``Class.name``."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{each.name}" for each in functions}
    return names


def _sections(path: Path) -> set[str]:
    """The anchors of a document: its headings', as GitHub makes them, and its own."""
    text = path.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    own = re.findall(r'<a (?:id|name)="([\w-]+)"', text)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(own)


@pytest.mark.parametrize("document", MAP, ids=_name)
def test_named_files_exist(document: Path) -> None:
    assert not {path for line in document.read_text().splitlines() for path in _absent(line)}


@pytest.mark.parametrize("document", MAP, ids=_name)
def test_named_definitions_exist(document: Path) -> None:
    """``Name`` in `` `file.py` (`Name`) ``, and any ``Class.name`` with a class that was named so before."""
    text, defined, missing = document.read_text(), set(), set()
    for file, names in re.findall(r"`([\w/]+\.py)`\s+\(((?:`[\w.]+`(?:,\s+)?)+)\)", text):
        found = _defined(ROOT / file)
        defined |= found
        missing |= {f"{file}: {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in found}
    classes = {name.split(".")[0] for name in defined if "." in name}
    for name in re.findall(r"`([A-Z]\w+\.\w+)`", text):
        if name.split(".")[0] in classes and name not in defined:
            missing.add(name)
    assert not missing


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *DECISIONS], ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, section = target.partition("#")
        path = document.parent / file if file else document
        if not path.exists() or (section and section not in _sections(path)):
            broken.append(target)
    assert not broken


def test_every_decision_is_listed_with_its_title_and_date() -> None:
    listed = ARCHITECTURE.read_text()
    assert DECISIONS
    for path in DECISIONS:
        head = re.match(r"# (\d+)\. (.+)\n\nDate: (\d{4}-\d\d-\d\d)\n", path.read_text())
        assert head is not None, path.name
        number, title, date = head.groups()
        assert path.name.startswith(f"{int(number):04}-"), path.name
        assert f"{date} [{title}](decisions/{path.name})" in listed, path.name
