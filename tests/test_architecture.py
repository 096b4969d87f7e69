"""The rules of the house, read from the source: imports go down, nothing runs at import, docstrings name shapes."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "plaudit"
FILES = sorted(SOURCE.rglob("*.py"))

FLOOR = {
    "core": 1,
    "configs": 1,
    "data": 2,
    "models": 3,
    "rewards": 4,
    "rollout": 5,
    "algorithms": 6,
    "evaluation": 7,
    "training": 8,
    "demo": 9,
    "serving": 9,
    "labelling": 9,
    "cli": 10,
    "__main__": 11,
}
"""Each room's floor: a room imports from itself and from lower floors only."""

ALLOWED_PACKAGES = {
    "core": {"torch"},
    "configs": {"pydantic", "pydantic_core", "yaml"},
}
"""Rooms that may import these packages (and the standard library) alone."""

PURE_CALLS = {
    *("frozenset", "tuple", "dict", "set", "list", "range", "len", "sum", "max", "min", "str", "float", "int", "zip"),
    *("TypeVar", "ParamSpec", "NewType", "NamedTuple", "Path", "MappingProxyType", "getLogger", "compile", "cast"),
    *("Parameter", "Field", "namedtuple", "dedent", "fields", "partial", "field", "chr", "ord", "itemgetter", "split"),
    *("keys", "values", "items", "join", "strip", "lower", "sorted", "union"),
}
"""What a module-level assignment may call, beside the project's own classes: it makes a constant, nothing more."""

SHAPED = ("core/", "evaluation/metrics")
"""Mathematics: public functions over tensors or arrays here name the shapes, such as `[P, K]`, in their docstring."""


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def room_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).parts
    if len(parts) > 1:
        return parts[0]
    return "__main__" if file.stem == "__main__" else ""


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports_of(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def faults_of_imports(tree: ast.AST, room: str, package: tuple[str, ...]) -> list[str]:
    faults = []
    for line, name in imports_of(tree, package):
        top, _, rest = name.partition(".")
        if top == "plaudit":
            target = rest.partition(".")[0]
            if target in FLOOR and target != room and FLOOR[target] >= FLOOR.get(room, 0):
                faults.append(f"line {line}: {room or 'plaudit'} imports {name}, which is not below it")
        elif room in ALLOWED_PACKAGES and top not in ALLOWED_PACKAGES[room] | set(sys.stdlib_module_names):
            faults.append(f"line {line}: {room} imports {name}")
    return faults


def faults_of_running(tree: ast.Module) -> list[str]:
    """Module-level statements that do something other than define."""
    faults = []
    pure = PURE_CALLS | own_classes(tree)
    for node in tree.body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Pass():
                pass
            case ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.ClassDef():
                faults += [
                    f"line {inner.lineno}: a statement runs in the body of class {node.name}"
                    for inner in node.body
                    if isinstance(inner, ast.For | ast.While | ast.With | ast.Try | ast.If)
                    or (isinstance(inner, ast.Expr) and not isinstance(inner.value, ast.Constant))
                ]
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                for call in calls_now(node.value) if node.value else ():
                    if called_name(call) not in pure:
                        faults.append(f"line {call.lineno}: {called_name(call)}(…) is called at import")
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Compare(left=ast.Name(id="__name__"))):
                pass
            case _ if type(node).__name__ == "TypeAlias":
                pass
            case _:
                faults.append(f"line {node.lineno}: {type(node).__name__} runs at import")
    return faults


def own_classes(tree: ast.Module) -> set[str]:
    """Names of classes that the module defines or imports from Plaudit, and of its functions that make functions."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns).startswith("Callable"):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plaudit"):
            names |= {alias.name for alias in node.names if re.match(r"[A-Z][a-z]", alias.name)}
    return names


def calls_now(node: ast.AST) -> Iterator[ast.Call]:
    """Calls below a node that run when it is evaluated: those inside a lambda do not."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_now(child)


def called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ast.unparse(function))


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions of a module and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def takes_arrays(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [argument.annotation for argument in arguments] + [function.returns]
    return any(re.search(r"Tensor|NDArray|ndarray|Array\b", ast.unparse(item)) for item in annotations if item)


def faults_of_docstrings(tree: ast.Module, *, shapes: bool) -> list[str]:
    faults = []
    for name, function in public_functions(tree):
        text = ast.get_docstring(function)
        if not text:
            faults.append(f"line {function.lineno}: {name} has no docstring")
        elif shapes and takes_arrays(function) and not re.search(r"\[[^\]]*\]|scalar|[Ss]hape", text):
            faults.append(f"line {function.lineno}: the docstring of {name} names no shape such as `[P, K]`")
    return faults


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_only_go_down(file: Path) -> None:
    package = ("plaudit", *file.relative_to(SOURCE).parts[:-1])
    assert not faults_of_imports(parse(file), room_of(file), package)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_runs_at_import(file: Path) -> None:
    assert not faults_of_running(parse(file))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_functions_have_docstrings(file: Path) -> None:
    assert not faults_of_docstrings(parse(file), shapes=name_of(file).startswith(SHAPED))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(parse(file)), f"{name_of(file)} has no docstring"


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(file) for file in FILES} - {""}
    assert rooms <= set(FLOOR), f"rooms without a floor: {sorted(rooms - set(FLOOR))}"
    assert {"core", "configs", "data", "models", "cli"} <= rooms


def test_no_path_of_one_machine() -> None:
    # Put together here so that this file does not hold what it looks for.
    folders = "|".join(("work", "root", "opt", "tmp", "home", "Users"))
    pattern = re.compile(rf"(?<![\w.~}}\]/-])/(?:{folders})/[\w.]+")
    names = ("src", "tests", "docs", "configs", "examples", "benchmarks", "studies", ".ci")
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".json", ".jsonl", ".sh", ".html", ".csv", ""}
    # Folders with a dot hold what the benchmarks install and compute; git ignores them.
    inside = [
        file
        for name in names
        for file in (ROOT / name).rglob("*")
        if not any(part == "__pycache__" or part.startswith(".") for part in file.relative_to(ROOT / name).parts)
    ]
    # In a second work tree `.git` is a file that says where the first one is.
    top = [file for file in ROOT.iterdir() if file.name != ".git"]
    files = [file for file in (*top, *inside) if file.is_file() and file.suffix in suffixes]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert len(files) > 20
    assert not found


@pytest.mark.parametrize(
    ("code", "room"),
    [
        ("from plaudit.models import reward_model", "data"),
        ("def f():\n    from plaudit.training.reward import main", "evaluation"),
        ("import numpy", "core"),
        ("import torch", "configs"),
        ("from ..cli import app", "core"),
        ("from plaudit import cli", "core"),
        ("from plaudit.configs.base import Config", "core"),
        ("from plaudit.serving import server", "demo"),
    ],
)
def test_the_import_rule_catches(code: str, room: str) -> None:
    assert faults_of_imports(ast.parse(code), room, ("plaudit", room))


@pytest.mark.parametrize(
    "code",
    [
        "print('hello')",
        "for i in range(3):\n    pass",
        "model = build_model()",
        "import torch\ntorch.manual_seed(0)",
        "class A:\n    register(3)",
        "with open('x') as f:\n    pass",
    ],
)
def test_the_running_rule_catches(code: str) -> None:
    assert faults_of_running(ast.parse(code))


def test_the_docstring_rule_catches() -> None:
    assert faults_of_docstrings(ast.parse("def f(x: Tensor) -> Tensor:\n    return x"), shapes=False)
    documented = ast.parse('def f(x: Tensor) -> Tensor:\n    """Returns it."""\n    return x')
    assert faults_of_docstrings(documented, shapes=True)
    assert not faults_of_docstrings(documented, shapes=False)
