import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "relora"

BELOW = {
    "common": set[str](),
    "budget": set[str](),
    "core": {"budget"},
    "optimizers": {"common", "budget", "core"},
    "methods": {"common", "budget", "core", "optimizers"},
    "config": {"common", "budget", "core", "optimizers", "methods"},
    "data": {"common", "config"},
    "runs": {"common", "config"},
    "tracking": {"common", "config", "runs"},
    "training": {"common", "budget", "core", "methods", "config", "data", "runs", "tracking"},
    "studies": {"common", "optimizers", "methods", "config", "runs", "tracking"},
    "launching": {"common", "config", "data", "runs", "tracking", "training", "studies"},
    "cli": {"common", "config", "data", "runs", "tracking", "training", "studies", "launching"},
}
"""The packages in their order, each with the packages that it may import."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" and path.parent != PACKAGE
)

HOMES = {
    "hydra": {"config.compose", "config.overrides"},
    "omegaconf": {"config.compose", "config.overrides", "config.typed"},
    "mlflow": {"tracking.store"},
    "pyarrow": {"data.decoding", "data.readers", "data.tokens"},
    "datasets": {"data.hub"},
    "huggingface_hub": {"data.hub"},
    "tokenizers": {"data.tokenizer"},
    "transformers": {
        *("data.tokenizer", "training.architecture", "training.model", "training.modeling_cola"),
        "training.pretrained",
    },
    "rich": {"tracking.console"},
    "matplotlib": {"studies.curves", "studies.drawing", "studies.memory_picture", "studies.pictures"},
    "optuna": {"launching.tune"},
    "submitit": {"launching.node", "launching.submit"},
}
"""The modules that import each of these libraries."""

WITHOUT_TORCH = ("common", "budget", "config", "tracking", "studies")


class RuntimeImports(ast.NodeVisitor):
    """The dotted names that a module of the package imports when it runs, inside functions too."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        only_for_types = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if only_for_types else ast.iter_child_nodes(node):
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
    return imports_of_source((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def own_imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, as package.module."""
    return {name.removeprefix("relora.") for name in imports_of(module) if name.startswith("relora.")} & set(MODULES)


def run_python(source: str) -> object:
    """The JSON value that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_package_says_what_it_holds_and_imports_from_below() -> None:
    folders = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert {folder.name for folder in folders} == set(BELOW)
    for folder in folders:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring is not None
        assert "\n\nImports " in docstring
    order = list(BELOW)
    for package, below in BELOW.items():
        assert below <= set(order[: order.index(package)])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_the_packages_below_its_own(module: str) -> None:
    package = module.partition(".")[0]
    names = {name.split(".")[1] for name in imports_of(module) if name.startswith("relora.")} - {"__version__"}
    assert names <= BELOW[package] | {package}


@pytest.mark.parametrize("package", BELOW)
def test_modules_of_a_package_have_no_import_cycle(package: str) -> None:
    own = {module: own_imports_of(module) for module in MODULES if module.startswith(f"{package}.")}
    graph = {module: {name for name in names if name in own} for module, names in own.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.slow
@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_by_its_own_modules(library: str) -> None:
    importers = {module for module in MODULES for name in imports_of(module) if name.split(".")[0] == library}
    assert importers == HOMES[library]


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_packages_without_torch_never_import_it(package: str) -> None:
    own = [module for module in MODULES if module.startswith(f"{package}.")]
    assert [module for module in own for name in imports_of(module) if name.split(".")[0] == "torch"] == []


def test_imports_are_found_everywhere_except_those_only_for_types() -> None:
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


@pytest.mark.slow
def test_importing_the_package_loads_no_torch() -> None:
    assert run_python("import json, sys, relora; print(json.dumps('torch' in sys.modules))") is False


@pytest.mark.slow
def test_the_clock_and_the_schedule_load_no_torch() -> None:
    source = """
import json, sys
from relora import JaggedCosine, RestartClock
print(json.dumps("torch" in sys.modules))
"""
    assert run_python(source) is False


@pytest.mark.slow
def test_the_algorithm_loads_torch_and_no_other_large_library() -> None:
    source = """
import json, sys
from relora import LowRankLinear, ReLoRAConfig, merge_and_reinit, reset_optimizer, unwrap, wrap
libraries = ["torch", "hydra", "omegaconf", "mlflow", "submitit", "transformers", "datasets", "tokenizers", "rich"]
print(json.dumps([name for name in libraries if name in sys.modules]))
"""
    assert run_python(source) == ["torch"]


@pytest.mark.slow
def test_modules_that_plan_compose_and_launch_a_run_load_no_torch() -> None:
    source = """
import json, sys
from importlib import import_module
loaded = {}
for module in ("budget.cost", "core.schedule", "config.run", "config.compose", "cli.main", "training.job"):
    import_module("relora." + module)
    loaded[module] = "torch" in sys.modules
print(json.dumps([module for module, torch in loaded.items() if torch]))
"""
    assert run_python(source) == []


@pytest.mark.slow
def test_every_public_name_comes_from_its_module() -> None:
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


@pytest.mark.slow
def test_the_plain_formula_installs_no_hook_on_optimizers() -> None:
    source = """
import json, torch
from torch.optim import optimizer
from relora import ReLoRAConfig, refresh, wrap
model = wrap(torch.nn.Sequential(torch.nn.Linear(8, 8)), ReLoRAConfig(rank=2, target_modules=["0"]))
model(torch.ones(1, 8)).sum().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
refresh(model, merged_weight="rebuilt")
counts = [len(optimizer._global_optimizer_pre_hooks)]
for _ in range(2):
    refresh(model)
    counts.append(len(optimizer._global_optimizer_pre_hooks))
print(json.dumps(counts))
"""
    assert run_python(source) == [0, 1, 1]
