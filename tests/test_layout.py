"""The shape of the house: imports point down, every template and grammar ships, no leftovers."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "ir": set(),
    "passes": {"ir"},
    "models": {"ir"},
    "codegen": {"ir"},
    "runtime": {"ir"},
    "compiler": {"ir", "passes", "models", "codegen", "runtime"},
}


def imports(path: Path) -> set[str]:
    """Top-level folders of the package that a file imports, whatever the form of the import."""
    depth = len(path.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {name.split(".")[0] for name in names if name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onelaunch."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("onelaunch.")}
    return found & set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder):
    for path in (ROOT / folder).rglob("*.py"):
        above = imports(path) - MAY_IMPORT[folder] - {folder}
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_every_package_and_data_file_ships():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {p.parent for f in MAY_IMPORT for p in (ROOT / f).rglob("__init__.py")}
    listed = {name.replace(".", "/") for name in config["packages"]}
    assert listed == {"onelaunch"} | {f"onelaunch/{p.relative_to(ROOT)}" for p in packages}
    shipped = {p for pattern in config["package-data"]["onelaunch"] for p in ROOT.glob(pattern)}
    files = {p for f in MAY_IMPORT for p in (ROOT / f).rglob("*") if p.is_file()}
    hidden = {p for p in files if any(part.startswith(".") for part in p.relative_to(ROOT).parts)}
    data = {p for p in files - hidden if p.suffix not in (".py", ".pyc", ".md")}
    assert data - shipped == set()


def test_only_the_chosen_folders_exist():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in tracked if "/" in name} - {".ci"}
    assert folders == {*MAY_IMPORT, "tests", "examples"} & folders
    assert set(MAY_IMPORT) <= folders


def test_nothing_names_this_machine():
    bad = re.compile(r"/wor[k]/|\bNotImplemente[d]\b|\bTOD[O]\b|\bFIXM[E]\b")
    for folder in (*MAY_IMPORT, "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".j2", ".h", ".ol", ".lark", ".md"):
                assert not bad.search(path.read_text()), path
