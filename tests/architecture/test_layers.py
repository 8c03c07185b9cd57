"""The layers of packages, the sizes of files and functions, and what must load fast. A change here changes the architecture."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pause_ray"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"tracking", "planning"},
    {"report"},
    {"sweep"},
    {"trial"},
    {"evaluation"},
    {"inference", "training"},
    {"models", "data"},
    {"text"},
    {"core"},
]
"""Packages from top to bottom; a module imports only from its own package and from lines below it."""

HEAVY = {
    "ray": {
        "cli",
        "planning",
        "sweep",
        "core.ray_cluster",
        "data.pipeline",
        "training.launch",
        "training.worker",
        "evaluation.scoring_pool",
    },
    "optuna": {"sweep.search"},
    "mlflow": {"tracking.store"},
    "torch": {"inference", "training", "models.sources", "models.weights"},
    "transformers": {"inference", "training", "models.sources", "models.weights"},
    "peft": {"inference.hf", "training", "models.weights"},
    "deepspeed": {"training"},
    "scipy": {"evaluation.statistics"},
}
"""The only packages or modules that may import a heavy library anywhere in their code."""

PROCESS_BORDERS = {
    "sweep.in_process",  # a trial: the error is kept and the sweep goes on
    "sweep.trainable",  # a trial's process: the error is kept and the sweep goes on
    "training.metrics",  # a thread: raised again by the one that started it
    "core.storage",  # tokenizers and safetensors raise Rust's errors, whose class says nothing; all but a full disk go on
    "tracking.store",  # another system, whose client raises whatever its transport raised
}
FILE_LINES, FUNCTION_LINES = 600, 60
EMPTY_NAMES = ("util", "helper", "common", "manager", "factory", "handler", "misc")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "pause_ray" else [node.module]
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_every_module_belongs_to_a_package_of_the_layers() -> None:
    assert [name for name in MODULES if name != "__init__" and name.split(".")[0] not in LEVELS] == []


def test_a_package_imports_only_from_layers_below_its_own() -> None:
    upwards = []
    for name, tree in MODULES.items():
        own = name.split(".")[0]
        for imported in imports(tree):
            target = imported.removeprefix("pause_ray.").split(".")[0]
            if imported.startswith("pause_ray.") and own in LEVELS and target not in (own, "__version__") and LEVELS[target] <= LEVELS[own]:
                upwards.append(f"{name} imports {imported}")
    assert upwards == []


def test_no_two_modules_have_one_name() -> None:
    """A specification is called ``spec`` in every package, and modules of ``cli`` are called as their verb."""
    names = Counter(name.split(".")[-1] for name in MODULES if not name.startswith("cli."))
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__", "spec")] == []


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_are_imported_only_where_they_belong(library: str) -> None:
    importers = {name for name, tree in MODULES.items() if any(found.split(".")[0] == library for found in imports(tree))}
    assert {name for name in importers if name not in HEAVY[library] and name.split(".")[0] not in HEAVY[library]} == set()
    assert importers


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    long_files = [path.name for path in PACKAGE.rglob("*.py") if path.read_text().count("\n") > FILE_LINES]
    long_functions = [f"{name}.{each.name}" for name, tree in MODULES.items() for each in functions(tree) if length(each) > FUNCTION_LINES]
    assert (long_files, long_functions) == ([], [])


def test_the_median_function_is_short() -> None:
    assert statistics.median(length(each) for tree in MODULES.values() for each in functions(tree)) <= 12


def test_names_say_something_about_the_domain() -> None:
    classes = [node.name for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [word for word in [*MODULES, *classes] if any(empty in word.lower() for empty in EMPTY_NAMES)] == []


def test_broad_excepts_that_end_an_error_stand_only_at_process_borders() -> None:
    """A broad except whose last statement is a plain ``raise`` ends no error: it only renames those that it knows."""
    broad = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        if ast.unparse(node.body[-1]) != "raise"
    }
    assert broad <= PROCESS_BORDERS


def test_the_command_line_loads_no_heavy_library() -> None:
    code = f"import sys, pause_ray.cli.main; print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_planning_a_trial_loads_no_heavy_library() -> None:
    """What a trial needs is computed from numbers, so ``pause-ray plan`` answers at once and needs the core alone."""
    code = f"import sys, pause_ray.trial.needs; print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.torch
def test_what_runs_on_an_accelerator_needs_neither_ray_nor_deepspeed_nor_mlflow() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'mlflow'): sys.modules[name] = None\n"
        "import pause_ray.inference.hf, pause_ray.evaluation.prefix_plan, pause_ray.training.model, pause_ray.training.batching\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_trial_is_prepared_without_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['ray'] = None\nimport pause_ray.trial.prepare"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
