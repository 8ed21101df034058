"""Who may import whom, and what the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import feedbackpath

ROOT = Path(feedbackpath.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A room imports from its own level or below; cycles between rooms are refused apart from that.
LEVELS = {
    "errors": 0,
    "ops": 1,
    "passage": 1,
    "layers": 2,
    "core": 2,
    "batchnorm": 2,
    "replicas": 3,
    "attention": 3,
    "surgery": 3,
    "mirror": 3,
    "rules": 3,
    "alignment": 4,
    "path": 5,
    "auditing": 6,
    "feedbackpath": 6,  # the package itself, which offers all of the above
    "bench": 7,
    "train": 7,
    "recipes": 8,
    "report": 8,
    "jobs": 9,
    "commands": 10,
    "data_commands": 10,
    "audit_command": 10,
    "mirror_command": 10,
    "bench_command": 10,
    "cli": 11,
    "__main__": 12,
}
ALONE = {"models", "data"}  # they import errors and nothing else of the package
HEAVY = {
    "matplotlib",
    "rich",
    "plotly",
    "pydantic",
    "cyclopts",
    "sklearn",
    "jinja2",
    "yaml",
    "PIL",
    "lightning_fabric",
    "safetensors",
}


def room_of(path):
    """Return the top-level room of a file: ``mirror`` for ``mirror/noise.py``."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "feedbackpath" if first == "__init__" else first


def imported_rooms(path):
    """Return the rooms that a file imports from, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "feedbackpath":
                is_room = rest and ((ROOT / rest[0]).is_dir() or (ROOT / f"{rest[0]}.py").exists())
                rooms.add(rest[0] if is_room else "feedbackpath")
    return rooms - {room_of(path)}


GRAPH = {}
for file in FILES:
    GRAPH.setdefault(room_of(file), set()).update(imported_rooms(file))


def test_every_room_has_its_place():
    assert GRAPH.keys() <= LEVELS.keys() | ALONE, "give the new room a level here and in the design"


@pytest.mark.parametrize("room", sorted(GRAPH))
def test_imports_go_one_way(room):
    if room in ALONE:
        assert GRAPH[room] <= {"errors"}
        return
    higher = {other for other in GRAPH[room] - ALONE if LEVELS[other] > LEVELS[room]}
    assert not higher, f"{room} imports from rooms above it"
    if LEVELS[room] <= LEVELS["feedbackpath"]:
        assert not GRAPH[room] & ALONE


def test_rooms_do_not_import_each_other_in_circles():
    left = {room: set(targets) for room, targets in GRAPH.items()}
    while free := {room for room, targets in left.items() if not targets & left.keys()}:
        left = {room: targets for room, targets in left.items() if room not in free}
    assert not left, "these rooms import each other"


def modules_after(statement):
    code = f"import sys; {statement}; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_core_imports_nothing_heavy():
    loaded = modules_after("import feedbackpath; feedbackpath.untie, feedbackpath.RULES, feedbackpath.Mirror")
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_the_package_answers_without_torch():
    assert "torch" not in modules_after("import feedbackpath; feedbackpath.__version__")


def test_all_public_names_exist():
    assert {name for name in feedbackpath.__all__ if hasattr(feedbackpath, name)} == set(feedbackpath.__all__)
    assert set(feedbackpath.__all__) <= set(dir(feedbackpath))
    with pytest.raises(AttributeError, match="no attribute 'unite'"):
        _ = feedbackpath.unite


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
