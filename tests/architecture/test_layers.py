"""Who may import whom, how large things may be, what must load fast. A change here is a change of the architecture."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pause_ray"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"sweep", "report", "status", "tracking", "ledger_comparison", "preflight", "submission"},
    {"sections", "heatmaps", "ledger_files", "best"},
    {"figures", "findings"},
    {"ranking"},
    {"results"},
    {"places", "search_record", "live_status", "labels"},
    {"trial", "compare", "plan"},
    {"corpus", "train", "needle"},
    {"engines", "cluster"},
    {"checkpoint"},
    {"rows", "documents", "text", "node_look"},
    {"packages", "source_files"},
    {"storage", "spec"},
    {"errors", "statistics", "words", "interruption", "logs"},
]
"""From top to bottom; a module imports only from lines below its own (and from its own package)."""

ENGINE = {f"engines.{name}" for name in ("hf", "weights", "greedy", "kv", "rows", "attention")}
"""The engine in this project's own processes."""

_MODEL = {f"engines.{name}" for name in ("weights", "gguf", "greedy", "kv", "rows", "attention")}
_TRAINED = {f"train.{name}" for name in ("model", "partition", "loss", "attention")}
_TRAINING = {f"train.{name}" for name in ("state", "telemetry", "steps", "worker", "export", "crew")}
HEAVY = {
    "ray": {
        "preflight",
        "node_look",
        "submission",
        "cluster",
        "corpus.streaming",
        "train.worker",
        "train.recovery",
        "train.launch",
        "needle.broker",
        "needle.fleet",
        "sweep.execution",
        "sweep.board",
        "sweep.watch",
        "sweep.governed",
        "sweep.heartbeat",
        "sweep.metrics",
        "sweep.governed_trial",
        "sweep.tpe",
        "sweep.tuning",
    },
    "optuna": {"sweep.tpe"},
    "mlflow": {"tracking.store", "tracking.models"},
    "torch": _MODEL | _TRAINED | _TRAINING | {"engines.hf"},
    "transformers": _MODEL | _TRAINED,
    "peft": {"engines.hf", "engines.weights", "train.model", "train.partition", "train.loss", "train.export"},
    "scipy": {"statistics"},
    "deepspeed": {"train.worker", "train.partition", "train.attention", "train.state"},
}
"""External package → the modules that import it anywhere in their code."""

PROCESS_BORDERS = {
    "sweep.tuning",  # a trial's process: what went wrong is kept and the sweep goes on
    "train.training_log",  # a thread: raised again by the one that started it
    "trial.rungs",  # likewise
    "storage",  # tokenizers and safetensors raise Rust's errors, whose class says nothing; all but a full disk go on
    "tracking.store",  # another system, whose client raises whatever its transport raised
}
FILE_LINES, FUNCTION_LINES = 600, 80
EMPTY_NAMES = ("util", "helper", "common", "manager", "factory", "handler", "misc")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "pause_ray" else [node.module]
    return found


def layer_of(name: str) -> int | None:
    top = name.split(".")[0]
    return next((index for index, layer in enumerate(LAYERS) if top in layer), None)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_only_from_layers_below_its_own(name: str) -> None:
    own = layer_of(name)
    assert own is not None, f"{name} stands on no line of LAYERS"
    for imported in imports(MODULES[name]):
        if not imported.startswith("pause_ray."):
            continue
        target = imported.removeprefix("pause_ray.")
        if target.split(".")[0] == name.split(".")[0] or target == "__version__":
            continue
        other = layer_of(target)
        assert other is not None, f"{name} imports {imported}, which stands on no line of LAYERS"
        assert other > own, f"{name} imports {imported}, which is not on a lower line"


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_heavy_packages_are_imported_only_where_they_belong(package: str) -> None:
    importers = {name for name, tree in MODULES.items() if any(found.split(".")[0] == package for found in imports(tree))}
    assert importers == HEAVY[package]


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_can_be_read_in_one_sitting(name: str) -> None:
    source = (PACKAGE / (name.replace(".", "/") + ".py")).read_text()
    assert source.count("\n") <= FILE_LINES
    for function in functions(MODULES[name]):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{name}.{function.name} has {length} lines"


def test_the_median_function_is_short() -> None:
    lengths = [(f.end_lineno or f.lineno) - f.lineno + 1 for tree in MODULES.values() for f in functions(tree)]
    assert statistics.median(lengths) <= 12


@pytest.mark.parametrize("name", MODULES)
def test_names_say_something_about_the_domain(name: str) -> None:
    classes = [node.name for node in ast.walk(MODULES[name]) if isinstance(node, ast.ClassDef)]
    for word in [name, *classes]:
        assert not any(empty in word.lower() for empty in EMPTY_NAMES), word


def test_broad_excepts_that_end_an_error_stand_only_at_process_borders() -> None:
    """One whose last word is a plain ``raise`` ends none: it only gives those it knows another name."""
    broad = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        if ast.unparse(node.body[-1]) != "raise"
    }
    assert broad <= PROCESS_BORDERS


def test_the_command_line_loads_no_heavy_package() -> None:
    code = f"import sys, pause_ray.cli.main; print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.torch
def test_what_runs_on_an_accelerator_needs_neither_ray_nor_deepspeed_nor_mlflow() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'mlflow'): sys.modules[name] = None\n"
        "import pause_ray.engines.hf, pause_ray.needle.walk, pause_ray.train.model, pause_ray.train.loop\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
