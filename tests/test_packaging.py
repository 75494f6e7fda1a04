"""The shape of the house: who may import whom, what an import costs, what a wheel carries, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowfast"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LAUNCHES = sorted((ROOT / "kernels" / "launches").glob("*.json"))

# Bottom first; a room imports only rooms of lower floors. mixture is a room of two modules.
FLOORS = (
    ("kernels", "seeds", "philox", "storage", "split_dot", "tableaux", "metrics", "rank", "cluster"),
    ("reference", "_cpp", "_triton", "students"),
    ("backends", "training", "stacked"),
    ("mixture", "operators", "ensemble"),
    ("flow_operators",),
    ("process", "perturbation"),
    ("ops",),
    ("flow", "sampling", "stability", "hessian", "modules"),
    ("grids", "teacher_pairs", "variational"),
    ("dataset",),
    ("step_pairs",),
    ("distillation",),
    ("theory",),
    ("experiments",),
    ("report",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("fsspec", "scipy", "matplotlib", "sklearn", "tyro", "rich", "jinja2", "triton", "pandas", "pyarrow", "ray")


def _room(module: str) -> str:
    """The room of `flowfast.x.y` (x), where mixture_files belongs to mixture."""
    name = module.split(".")[1]
    return "mixture" if name.startswith("mixture_") else name


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports from flowfast, wherever in the file, type checking aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "flowfast":
            yield from (f"flowfast.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowfast."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flowfast."))


def _name(path: Path) -> str:
    return ".".join(("flowfast", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=_name)
def test_imports_point_down(path: Path) -> None:
    room = _room(_name(path))
    assert room in FLOOR, f"give {room} a floor in {Path(__file__).name}"
    for module in _imports(path):
        other = _room(module)
        assert other == room or FLOOR[other] < FLOOR[room], f"{_name(path)} imports {module}"
        assert not module.endswith("._core") or room == "_cpp", f"{_name(path)} imports the extension"
        assert other != "kernels" or room == "_triton", f"{_name(path)} imports the kernels"


def _modules_of(path: Path, names: set[str]) -> Iterator[str]:
    """Modules of `names` that a module imports, type checking included; a package only where no module of it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in names else str(node.module) for name in whole} & names
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & names


def test_no_circle_of_imports() -> None:
    """Also within a package, and where an import inside a function would hide it."""
    modules = {_name(path).removesuffix(".__init__"): path for path in MODULES if path != PACKAGE / "__init__.py"}
    graph = {name: set(_modules_of(path, set(modules))) for name, path in modules.items()}
    assert "flowfast.dataset.store" in graph["flowfast.dataset.addresses"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{' <- '.join(error.args[1])}: give what both need a module of its own")


def test_kernels_know_nothing_of_the_package() -> None:
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "__future__"} | set(sys.stdlib_module_names), f"{path.name}: {name}"


@pytest.mark.parametrize("path", MODULES + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_code_keeps_the_rules(path: Path) -> None:
    """No print outside the command line, no assert on input, no pickle in any disguise."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert"
        if isinstance(node, ast.Name) and node.id == "print":
            assert path.parent.name == "cli", f"{where}: print"
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and isinstance(node.value, ast.Name):
            assert node.value.id != "torch", f"{where}: torch.{node.attr} pickles"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{where}: allow_pickle"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), f"{where}: pickle"


def test_files_stay_short() -> None:
    limits = {path: 300 for path in [*MODULES, *KERNELS, *(ROOT / "csrc").glob("*.[ch]pp")]}
    limits |= {ROOT / "setup.py": 60, ROOT / "README.md": 150}
    lines = {path: len(path.read_text().splitlines()) for path in limits}
    assert not {str(path.relative_to(ROOT)): lines[path] for path, most in limits.items() if lines[path] > most}


def test_importing_flowfast_imports_nothing_heavy() -> None:
    """What makes an import slow is what it drags along: nothing but torch, NumPy and safetensors may be."""
    code = """
import sys, torch
before = set(sys.modules)
import flowfast
names = [getattr(flowfast, name) for name in flowfast.__all__]
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert "flowfast" in tops and not tops & set(HEAVY)


def test_public_names_are_exported_on_purpose() -> None:
    """Type checkers see only names that __init__ lists or re-exports under their own name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    listed = {
        element.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
        for element in ast.walk(node.value)
        if isinstance(element, ast.Constant)
    }
    sources = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = [alias for node in sources if (node.module or "").startswith("flowfast.") for alias in node.names]
    assert imported and all(alias.asname == alias.name or alias.name in listed for alias in imported)


def test_every_package_and_its_data_is_installed(tmp_path: Path) -> None:
    """What setuptools would put into a wheel, the extension aside, from the sources as they stand."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"flowfast/{path.relative_to(PACKAGE)}" for path in MODULES}
    expected |= {f"flowfast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in KERNELS + LAUNCHES}
    expected |= {f"flowfast/report/{path.name}" for path in (PACKAGE / "report").glob("*.html*")} | {
        "flowfast/py.typed",
        "flowfast/experiments/paper/published_tables.json",
    }
    assert installed >= expected


def test_pins_lie_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.strip().lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(line for name in extras for line in extras[name])]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
