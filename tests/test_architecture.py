"""The layers, ceilings and house rules that keep the package readable."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spearrl"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a module imports only from lower layers and from its own room. CONTRIBUTING.md has the same table.
LAYERS = [
    {"errors", "types", "seeds"},
    {"losses", "advantages", "schedules", "processes", "faults"},
    {"config", "shaping"},
    {"sandbox", "batching", "sync"},
    {"buffers", "models", "envs"},
    {"rollout", "learner", "algorithm"},
    {"run", "start"},
    {"launch"},
    {"evaluation"},
    {"trainer"},
    {"study"},
    {"cli"},
    {"__main__"},
]
ROOMS = 26
BUDGETS = {"trainer.py": 250}
PACKAGE_LINES = 21_900
HEAVY = {"vllm": {"rollout", "sync"}, "deepspeed": {"learner"}, "ray": {"launch"}, "peft": {"learner"}}
HEAVY["transformers"] = {"models", "rollout", "learner"}

# A module's name stands once in the package, but for these, which mean the same thing in each place.
SAME_MODULES = {
    "env": "the Environment of a built-in environment",
    "expert": "the script that wins its tasks",
    "generate": "what makes its tasks",
    "compact": "its short texts for tiny models",
    "answers": "how it judges an answer",
    "data": "its reader of real data",
    "protocol": "what every engine, and every learner, offers",
    "engine": "the Engine of a kind of engine",
    "receiver": "what takes new weights in a kind of engine",
    "learner": "the Learner of a kind of learner",
    "local": "in the trainer's own process, in plain torch",
    "loading": "from files to the thing itself",
    "config": "the verb `spearrl config` and the room it shows",
    "sft": "the verb `spearrl sft` and what it runs",
    "replay": "what was there before, once more: rows of the buffer, the verb's batch",
    "study": "the verb `spearrl study` and what it runs",
}
SAME_CLASSES = {"Expert": "the script that wins an environment's tasks", "Options": "an environment's settings"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    levels = [level for level, parts in enumerate(LAYERS) if part in parts]
    assert levels, f"spearrl.{part} has no layer: give it one in tests/test_architecture.py"
    return levels[0]


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(ast.parse(path.read_text())):
        pieces = name.split(".")
        if pieces[0] == "spearrl" and len(pieces) > 1 and pieces[1] not in (part, "__version__"):
            other = pieces[1]
            assert layer_of(other) < layer_of(part), (
                f"{part} (layer {layer_of(part)}) imports {other} (layer {layer_of(other)})"
            )


def test_the_layers_are_those_of_the_page():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .+ \|$", page, re.MULTILINE)
    expected = [(level, room) for level, rooms in enumerate(LAYERS) for room in rooms if room != "__main__"]
    assert sorted((int(level), room) for level, room in rows) == sorted(expected)


def test_the_rooms_are_few_enough_to_know():
    rooms = {part_of(path) for path in FILES} - {"__init__", "__main__"}
    assert len(rooms) <= ROOMS, sorted(rooms)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is imported, and those for the type checker."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from top_imports(node.body)


def test_no_modules_import_each_other_in_a_circle():
    modules = {module_name(path): path for path in FILES}
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in modules.items():
        for node in top_imports(ast.parse(path.read_text()).body):
            names = [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parents = [name if name in modules else name.rpartition(".")[0] for name in names]
            graph[module] |= {name for name in parents if name in modules} - {module}
    assert sum(map(len, graph.values())) > 300
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_one_name_means_one_thing():
    modules, classes = defaultdict(list), defaultdict(list)
    for path in FILES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        if path.stem != path.parent.name:  # a room and the module of its name in it, such as check/check.py: one thing
            modules[name].append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(path)
    for kind, places, same in (("module", modules, SAME_MODULES), ("class", classes, SAME_CLASSES)):
        twice = {name: paths for name, paths in places.items() if len(paths) > 1}
        strange = {
            name: [str(p.relative_to(PACKAGE)) for p in paths] for name, paths in twice.items() if name not in same
        }
        assert not strange, f"a {kind}'s name stands for two things: {strange}"
        assert set(same) <= set(twice), f"no longer there twice, so out of the list: {sorted(set(same) - set(twice))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_inside_functions_of_their_module(path: Path):
    tree = ast.parse(path.read_text())
    top = imports_of(
        ast.Module(body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[])
    )
    for library, homes in HEAVY.items():
        assert not any(name.split(".")[0] == library for name in top), (
            f"{library} is imported at the top of {path.name}"
        )
        if any(name.split(".")[0] == library for name in imports_of(tree)):
            assert part_of(path) in homes, f"{library} is imported outside {sorted(homes)}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if part_of(p) in ("envs", "types", "errors", "seeds", "config")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_environments_and_config_never_import_torch(path: Path):
    assert not any(name.split(".")[0] == "torch" for name in imports_of(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("losses/*.py")), ids=lambda p: p.name)
def test_a_loss_pastes_into_a_notebook(path: Path):
    names = {name for name in imports_of(ast.parse(path.read_text())) if name.startswith("spearrl")}
    assert all(name.startswith(("spearrl.errors", "spearrl.losses")) for name in names), names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ceilings(path: Path):
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= BUDGETS.get(str(path.relative_to(PACKAGE)), 400), f"{path.name} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines"
            positional = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
            assert len(positional) <= 5, (
                f"{path.name}:{node.lineno} {node.name} takes {len(positional)} positional arguments"
            )
            assert node.args.kwarg is None or node.name in ("__init__", "make"), (
                f"{path.name}:{node.lineno} {node.name} passes **kwargs through"
            )


def code_lines(text: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in documented]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_the_package_stays_small(tmp_path: Path):
    """Lines are counted as on the day the ceiling was set, so that a narrower page does not count as more code.

    That is: code as `ruff format` lays it out at 160 columns without magic trailing commas, blank lines, comments and
    docstrings left out; and every line of TOML that is neither blank nor a comment.
    """
    shutil.copytree(PACKAGE, tmp_path / "spearrl", ignore=shutil.ignore_patterns("__pycache__"))
    settings = 'line-length = 160\ntarget-version = "py311"\n[format]\nskip-magic-trailing-comma = true\n'
    (tmp_path / "ruff.toml").write_text(settings)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(tmp_path / "spearrl")], check=True)
    code = sum(code_lines(path.read_text()) for path in tmp_path.rglob("spearrl/**/*.py"))
    tables = [line.strip() for path in PACKAGE.rglob("*.toml") for line in path.read_text().splitlines()]
    data = sum(bool(line) and not line.startswith("#") for line in tables)
    assert code + data <= PACKAGE_LINES, f"{code} lines of Python and {data} of TOML"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_the_house_forbids(path: Path):
    assert path.name not in ("utils.py", "helpers.py"), path
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            swallowed = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not swallowed, f"{path.name}:{node.lineno} swallows an exception"
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno} asserts: raise an error with a hint"
        if isinstance(node, ast.Name):
            assert node.id not in ("padding_mask", "logp1"), f"{path.name}:{node.lineno} {node.id}"


def test_losses_and_advantages_stay_small():
    files = [PACKAGE / "advantages.py", *(PACKAGE / "losses").glob("*.py")]
    assert sum(code_lines(p.read_text()) for p in files) <= 750


def test_every_data_file_is_packaged():
    """A wheel without its tables would fail on the first import."""
    settings = ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    patterns = " ".join(settings["options.package_data"].values()).split()
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert len(files) > 5
    for path in files:
        assert any(path.match(pattern) for pattern in patterns), f"{path} is in no package_data pattern of setup.cfg"
