import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "relora"

FLOORS = [
    ["errors", "signals", "cost", "memory", "schedule"],
    ["merged", "lowrank", "reset", "galore", "loss", "inbackward"],
    [
        *(
            "files",
            "checks",
            "groups",
            "cluster",
            "rates",
            "config",
            "model",
            "data",
            "rundir",
            "credentials",
            "metrics",
            "checkpoint",
            "spent",
            "warmstart",
        ),
        *("distributed", "evaluate"),
    ],
    ["methods", "microsteps", "underway", "trainer"],
    [
        *(
            "choices",
            "compose",
            "presets",
            "plan",
            "tuned",
            "sweeps",
            "baselines",
            "slurm",
            "state",
            "results",
            "gaps",
            "compare",
            "study",
            "store",
            "tracking",
            "view",
        ),
        *("corpus", "console", "status", "page", "pictures", "doubts", "report", "disk"),
    ],
    ["ranks", "export", "job", "publish", "submit", "gpus", "launch", "control", "ui", "tune", "clean", "cli"],
]
"""From the ground up; a module imports from floors below its own, or from one that stands before it on its own."""

ORDER = [module for floor in FLOORS for module in floor]

HOMES = {
    "hydra": "compose",
    "omegaconf": "compose",
    "mlflow": "store",
    "datasets": "corpus",
    "tokenizers": "corpus",
    "transformers": "model",
    "rich": "console",
    "matplotlib": "pictures",
    "optuna": "tune",
    "submitit": "submit",
}
"""The one module that imports each of these libraries."""


class RuntimeImports(ast.NodeVisitor):
    """Dotted names of all that a module of the package imports when it runs, inside functions too."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        for_types_alone = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if for_types_alone else ast.iter_child_nodes(node):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = ".".join(part for part in ("relora" if node.level else "", node.module or "") if part)
        self.names |= {f"relora.{alias.name}" for alias in node.names} if source == "relora" else {source}

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.names.add(name.value)
        self.generic_visit(node)


def imports_of_source(source: str) -> set[str]:
    visitor = RuntimeImports()
    visitor.visit(ast.parse(source))
    return visitor.names


def imports_of(module: str) -> set[str]:
    return imports_of_source((PACKAGE / f"{module}.py").read_text())


def own_imports_of(module: str) -> set[str]:
    return {name.split(".")[1] for name in imports_of(module) if name.startswith("relora.")}


def run_python(source: str) -> object:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_module_of_the_package_stands_on_one_floor() -> None:
    files = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")} - {
        "__init__",
        "__main__",
    }
    assert sorted(ORDER) == sorted(files)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_from_floors_below_or_from_before_it_on_its_own(module: str) -> None:
    allowed = set(ORDER[: ORDER.index(module)]) | {"__version__"}
    assert own_imports_of(module) <= allowed


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_by_its_own_module_alone(library: str) -> None:
    importers = {
        module for module in ["__init__", *ORDER] for name in imports_of(module) if name.split(".")[0] == library
    }
    assert importers == {HOMES[library]}


def test_imports_are_found_wherever_they_stand_and_those_for_types_alone_are_not() -> None:
    source = """
import relora.a
from relora import b as other
from relora.c import x
from . import d
from .e import y
if TYPE_CHECKING:
    from relora.types import z
else:
    import relora.f
class C:
    def method(self):
        if self:
            from relora.g import z
        import_module("relora.h")
        import torch.nn
"""
    assert imports_of_source(source) == {*(f"relora.{letter}" for letter in "abcdefgh"), "torch.nn"}


# ------------------------------------------------------------------------------------------ what an import loads


def test_importing_the_package_loads_no_torch() -> None:
    assert run_python("import json, sys, relora; print(json.dumps('torch' in sys.modules))") is False


def test_the_clock_and_the_schedule_load_no_torch() -> None:
    source = """
import json, sys
from relora import JaggedCosine, RestartClock
print(json.dumps("torch" in sys.modules))
"""
    assert run_python(source) is False


def test_the_algorithm_loads_torch_and_none_of_the_edges() -> None:
    source = """
import json, sys
from relora import LowRankLinear, ReLoRAConfig, merge_and_reinit, reset_optimizer, unwrap, wrap
libraries = ["torch", "hydra", "omegaconf", "mlflow", "submitit", "transformers", "datasets", "tokenizers", "rich"]
print(json.dumps([name for name in libraries if name in sys.modules]))
"""
    assert run_python(source) == ["torch"]


def test_what_plans_composes_and_launches_a_run_is_imported_without_torch() -> None:
    source = """
import json, sys
from importlib import import_module
loaded = {}
for module in ("cost", "schedule", "config", "compose", "cli", "job"):
    import_module("relora." + module)
    loaded[module] = "torch" in sys.modules
print(json.dumps([module for module, torch in loaded.items() if torch]))
"""
    assert run_python(source) == []


def test_every_public_name_comes_from_its_home() -> None:
    source = """
import json, relora
print(json.dumps({name: getattr(relora, name).__module__ for name in relora.__all__}))
"""
    homes = run_python(source)
    assert isinstance(homes, dict)
    typed = {
        alias.name: node.module
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relora.")
        for alias in node.names
    }
    assert homes == typed


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import relora

    with pytest.raises(AttributeError, match="warp"):
        relora.warp  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert set(relora.__all__) <= set(dir(relora))
