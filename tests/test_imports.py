"""The arrows of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"kernels", "model", "data", "train", "eval", "scripts", "conf"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data": {"data"},
    "model": {"model", "kernels"},
    "train": {"train", "eval", "model", "data"},  # a run scores itself; eval never imports train
    "eval": {"eval", "model", "data"},
    "scripts": ROOMS - {"conf"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names & ROOMS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_follow_the_arrows(room):
    files = list((ROOT / room).rglob("*.py"))
    for path in files:
        extra = imported_rooms(path) - MAY_IMPORT[room]
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"
