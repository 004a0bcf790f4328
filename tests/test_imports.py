"""Imports go in one direction: lion_models -> deqcore (public names) -> deqcore.ops."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deqcore
from tools.import_graph import arrows, circles, imports

ROOT = Path(__file__).parent.parent
CLIENTS = [
    path
    for folder in ("lion_models", "examples")
    if (ROOT / folder).exists()
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Of lion_models, from the ground up: a room knows those before it alone.
ROOMS = ("base", "data", "backbones", "prompts", "methods", "run", "study", "cli")
# Sub-packages that are public by their own name.
PUBLIC_MODULES = {
    "deqcore",
    "deqcore.compat",
    "deqcore.compat.torchdeq",
    "deqcore.normalization",
}


def attributes_of_deqcore(path: Path) -> set[str]:
    """Names n in `deqcore.n`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "deqcore"
    }


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_clients_use_public_names_of_deqcore_alone(path):
    for module, name in imports(path):
        if module.split(".")[0] != "deqcore":
            continue
        assert module in PUBLIC_MODULES, f"{path.name} imports {module}"
        if module == "deqcore" and name is not None:
            assert name in deqcore.__all__, f"deqcore.{name} is not public"
    submodules = {name.split(".")[1] for name in PUBLIC_MODULES if "." in name}
    assert attributes_of_deqcore(path) <= {*deqcore.__all__, *submodules}


def test_the_check_of_imports_sees_private_ones(tmp_path):
    client = tmp_path / "client.py"
    client.write_text("from deqcore.ops import anderson_step\nimport deqcore\ndeqcore._loop\n")
    assert ("deqcore.ops", "anderson_step") in imports(client)
    assert attributes_of_deqcore(client) == {"_loop"}


def test_there_are_clients_to_check():
    assert any(path.parts[-2] == "lion_models" for path in CLIENTS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deqcore").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_deqcore_imports_only_what_it_declares(path):
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1]
    names = {name.replace("-", "_") for name in re.findall(r"\"([\w-]+)", declared)}
    assert "torch" in names
    allowed = {"deqcore", *names, *sys.stdlib_module_names}
    if path.name == "_picture.py":  # loaded by Diagnosis.save alone, which says what it needs
        allowed |= {"matplotlib"}
    assert {module.split(".")[0] for module, _ in imports(path)} <= allowed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deqcore/ops").rglob("*.py")), ids=lambda path: path.name
)
def test_ops_know_tensors_alone(path):
    modules = {module for module, _ in imports(path) if module.split(".")[0] == "deqcore"}
    below = ("deqcore.ops", "deqcore._status", "deqcore._compile")
    assert all(module.startswith(below) for module in modules), modules


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sparsity.SparsityPattern", deqcore.SparsityPattern),
        ("masked.MaskedLinear", deqcore.MaskedLinear),
        ("pruning.prune_layer", deqcore.prune_layer),
        ("_solution.Status", deqcore.Status),
    ],
)
def test_pickles_of_0_1_0_find_their_classes(old, new):
    module, name = old.split(".")
    assert pickle.loads(f"cdeqcore.{module}\n{name}\n.".encode()) is new
    assert getattr(getattr(deqcore, module), name) is new


def test_public_names_exist_and_are_documented():
    for name in deqcore.__all__:
        if name.startswith("__"):
            continue
        value = getattr(deqcore, name)
        assert value.__doc__, f"deqcore.{name} has no docstring"
        assert not getattr(value, "__module__", "deqcore").startswith("torch")


def test_importing_deqcore_loads_no_optional_dependency():
    code = (
        "import sys, deqcore; "
        "print(*{m.split('.')[0] for m in sys.modules} & {'lion_models', 'torchdeq', 'matplotlib', "
        "'safetensors', 'rich_click', 'sklearn', 'pytest'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_what_a_training_run_does_not_need_is_loaded_when_asked_for():
    code = """
import sys, deqcore
assert not any(name.startswith("deqcore.diagnosis") for name in sys.modules)
from deqcore import diagnose
assert diagnose is deqcore.diagnose and "deqcore.diagnosis" in sys.modules
assert "deqcore.diagnosis._picture" not in sys.modules
try:
    deqcore.diagnos
except AttributeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "module 'deqcore' has no attribute 'diagnos'"


USES = {
    "import": "",
    "solve": """
f = lambda z, x: 0.5 * z + x
x = torch.ones(2, 3, requires_grad=True)
deqcore.fixed_point(f, torch.ones(2, 3), x).value.sum().backward()
""",
    "sparse": """
pattern = deqcore.SparsityPattern.from_mask(torch.rand(8, 8) > 0.5)
deqcore.MaskedLinear(pattern)(torch.ones(2, 8)).sum().backward()
""",
}


@pytest.mark.parametrize("use", USES)
def test_the_tracer_of_torch_compile_is_not_loaded_before_something_is_compiled(use):
    """torch._dynamo takes as long to import as torch itself."""
    slow = ["torch._dynamo", "torch._inductor"]
    if use == "import":  # torch's own backward pass imports it
        slow.append("sympy")
    code = f"""
import sys, torch
before = set(sys.modules)
import deqcore
{USES[use]}
print([name for name in {slow} if name in set(sys.modules) - before])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["deqcore", "lion_models"])
def test_no_rooms_import_each_other_in_a_circle(package):
    assert circles(arrows(ROOT / package)) == []


def test_the_rooms_of_lion_models_know_those_below_alone():
    graph = arrows(ROOT / "lion_models")
    assert set(graph) == {*ROOMS, "__init__", "__main__"}
    for height, room in enumerate(ROOMS):
        above = {other: files for other, files in graph[room].items()
                 if other not in ROOMS[:height]}  # fmt: skip
        assert not above, f"{room} imports {above}"


def test_circles_and_imports_inside_functions_are_seen(tmp_path):
    package = tmp_path / "house"
    for room, text in {
        "attic": "from house.cellar.wine import red",
        "cellar": "def fetch():\n    from house import hall",
        "hall": "import house.attic.trunk",
        "porch": "from house import hall",
    }.items():
        (package / room).mkdir(parents=True)
        (package / room / "inside.py").write_text(text)
    graph = arrows(package)
    assert graph["cellar"] == {"hall": ["cellar/inside.py"]}
    assert circles(graph) == [["attic", "cellar", "hall"]]
