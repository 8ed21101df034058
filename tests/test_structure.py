"""Who may import whom, and what the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import feedbackpath

ROOT = Path(feedbackpath.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A file imports from rooms of its own level or below; circles of files are refused apart from that.
LEVELS = {
    "errors": 0,
    "arguments": 0,
    "layers": 0,  # plain modules: torch, and nothing of the package
    "core": 1,
    "attention": 2,
    "kinds": 2,
    "mirror": 2,
    "hardware": 2,
    "rules": 3,
    "measure": 4,
    "moments": 4,
    "path": 5,
    "auditing": 6,
    "integrations": 6,
    "feedbackpath": 6,  # the package itself, which offers all of the above
    "bench": 7,
    "tasks": 7,
    "train": 7,
    "recipes": 8,
    "report": 8,
    "jobs": 9,
    "cli": 10,
    "__main__": 11,
}
ALONE = {"models", "data"}  # they import errors, plain layers and nothing else of the package
# Files of the core from bottom to top: none comes to one that stands after it, by whatever way.
CORE = ["layers", "context", "sendback", "exchange", "modules", "surgery"]
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


def file_of(name):
    """Return the file that a dotted name is imported from: a module's own, or that of the module it is in."""
    place = ROOT.joinpath(*name.split(".")[1:])
    if place.is_dir():
        return place / "__init__.py"
    module = place.parent / f"{place.name}.py"
    return module if module.exists() else file_of(name.rpartition(".")[0])


def imports_in(tree):
    """Yield the imports that run, wherever they stand: not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for part in node.orelse:
                yield from imports_in(part)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        else:
            yield from imports_in(node)


def imported_files(path):
    """Return the files of this package that a file imports from."""
    files = set()
    for node in imports_in(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        files |= {file_of(name) for name in names if name.partition(".")[0] == "feedbackpath"}
    return files - {path}


GRAPH = {file: imported_files(file) for file in FILES}
over_files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in FILES}
    assert rooms <= LEVELS.keys() | ALONE, "give the new room a level here and in the design"


@over_files
def test_imports_go_one_way(path):
    room, found = room_of(path), {room_of(file) for file in GRAPH[path]}
    if room in ALONE:
        assert found <= {"errors", "arguments", "layers", room}
        return
    if room == "layers":
        assert not found
    higher = {other for other in found - ALONE if LEVELS[other] > LEVELS[room]}
    assert not higher, f"{path} imports from rooms above its own"
    if LEVELS[room] <= LEVELS["feedbackpath"]:
        assert not found & ALONE


def circles_in(graph):
    """Return what is left of a graph when all that is in no circle, or between two, has been taken away."""
    left = dict(graph)
    while True:
        named = set().union(*left.values())
        within = {node: targets & left.keys() for node, targets in left.items() if node in named}
        kept = {node: targets for node, targets in within.items() if targets}
        if kept == left:
            return left
        left = kept


def test_files_do_not_import_each_other_in_circles():
    left = circles_in(GRAPH)
    names = {str(path.relative_to(ROOT)) for path in left}
    assert not left, f"these files import each other: {sorted(names)}"


def test_a_circle_would_be_found():
    assert circles_in({1: {2}, 2: {3, 4}, 3: {2}, 4: {5}, 5: set()}) == {2: {3}, 3: {2}}
    assert circles_in({1: {2}, 2: {3}, 3: set()}) == {}


def reached_from(path):
    """Return the files that a file imports, and those that these import, and so on."""
    reached, new = set(), {path}
    while new:
        reached |= new
        new = set().union(*(GRAPH[file] for file in new)) - reached
    return reached - {path}


def test_the_core_is_read_from_bottom_to_top():
    core = ROOT / "core"
    for number, name in enumerate(CORE):
        found = {path.stem for path in reached_from(core / f"{name}.py") if path.parent == core}
        assert not found & set(CORE[number + 1 :]), f"core/{name}.py comes to files that stand above it"


LINES = {path: len(path.read_text().splitlines()) for path in FILES}


def lines_beyond(limit, paths):
    return {str(path.relative_to(ROOT)): LINES[path] for path in paths if LINES[path] > limit}


def test_the_core_can_be_read_in_one_sitting():
    assert sum(lines for path, lines in LINES.items() if room_of(path) == "core") <= 2500


def test_no_file_is_long():
    assert lines_beyond(400, FILES) == {}


def test_a_rule_fits_on_a_few_screens():
    assert lines_beyond(150, [path for path in FILES if room_of(path) == "rules"]) == {}


def test_the_path_is_short_and_names_no_rule():
    path = ROOT / "path.py"
    assert not {file.name for file in GRAPH[path] if room_of(file) == "rules"} - {
        "__init__.py",
        "base.py",
        "checks.py",
        "choice.py",
        "forgotten.py",
        "guard.py",
        "unfit.py",
        "clock.py",
    }
    assert lines_beyond(250, [path]) == {}


def own_names(trees):
    """Return every name with an underscore in front that the package itself gives to something."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def torchs_names(trees):
    """Return the names inside PyTorch that are used: by ``_find``, or as attributes of objects."""
    own = set(own_names(trees))
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_find":
            yield ast.literal_eval(node.args[0]).rpartition(".")[2]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if is_inherited or node.attr not in own:
                yield node.attr


def test_little_is_taken_from_inside_pytorch():
    trees = [ast.parse(p.read_text()) for p in FILES if room_of(p) in ("core", "rules", "measure", "path")]
    names = sorted(set(torchs_names(trees)))
    assert {"_lazy_clone", "_load_from_state_dict", "_current_graph_task_id"} <= set(names)
    assert len(names) <= 10, f"names of PyTorch's that begin with an underscore: {', '.join(names)}"


def modules_after(statement):
    code = f"import sys; {statement}; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def packages_after(statement):
    return {name.partition(".")[0] for name in modules_after(statement)}


def test_the_core_imports_torch_and_numpy_alone():
    names = sorted(path.stem for path in (ROOT / "core").glob("*.py") if path.stem != "__init__")
    files = ", ".join(f"feedbackpath.core.{name}" for name in names)
    loaded = (
        packages_after(f"import {files}") - packages_after("import torch, numpy") - sys.stdlib_module_names
    )
    assert loaded == {"feedbackpath"}


def test_rules_that_do_not_mirror_do_not_load_the_mirror():
    rules = ("base", "backprop", "feedback_alignment", "sign_symmetry", "kolen_pollack")
    files = {f"feedbackpath.rules.{rule}" for rule in rules}
    loaded = modules_after(f"import {', '.join(files)}")
    assert files <= loaded
    assert not {name for name in loaded if name.startswith("feedbackpath.mirror")}
    assert "feedbackpath.mirror" in modules_after("import feedbackpath.rules.weight_mirror")


def test_the_core_imports_nothing_heavy():
    loaded = packages_after(
        "import feedbackpath; feedbackpath.untie, feedbackpath.RULES, feedbackpath.Mirror"
    )
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_the_package_answers_without_torch():
    assert "torch" not in modules_after("import feedbackpath; feedbackpath.__version__")


def test_all_public_names_exist():
    assert {name for name in feedbackpath.__all__ if hasattr(feedbackpath, name)} == set(feedbackpath.__all__)
    assert set(feedbackpath.__all__) <= set(dir(feedbackpath))
    with pytest.raises(AttributeError, match="no attribute 'unite'"):
        _ = feedbackpath.unite


@over_files
def test_nothing_is_printed(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
