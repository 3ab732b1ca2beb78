"""Whether the code of a method is still the code that gave kept results."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from ._oracles import ORACLES
from ._registry import METHODS


def method_source(name: str, script: Path | None = None) -> str:
    """Hash of a method's code: of its module, and of all that this imports from its own package.

    Comments, docstrings and how lines break do not count.

    Parameters
    ----------
    name
        A method by name, or ``"package.module:Class"``.
    script
        The script of a peer instead, and the helpers beside it.
    """
    if script is not None:
        files = [script, *sorted(script.parent.glob("_*.py"))]
        return sha256("".join(_code(f.read_text()) for f in files).encode()).hexdigest()
    if name in ORACLES:
        return ""
    return package_source(METHODS[name].module if name in METHODS else name.partition(":")[0])


@cache
def package_source(module: str) -> str:
    """Hash of the code of a module and of what it imports from its own package, at any depth."""
    modules = package_modules(module)
    found = {name: _code(path.read_text()) for name, path in modules.items()}
    # Networks that come with the package are read by the code beside them.
    for folder in {path.parent for path in modules.values()}:
        found |= {f.name: sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    return sha256("".join(f"{n}\n{c}\n" for n, c in sorted(found.items())).encode()).hexdigest()


def package_modules(module: str) -> dict[str, Path]:
    """Files of a module and of what it imports from its own package, at any depth."""
    package, found, todo = module.split(".")[0], dict[str, Path](), [module]
    while todo:
        name = todo.pop()
        path = None if name in found else _file(name)
        if path is None:
            continue
        found[name] = path
        within = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports = _imports(ast.parse(path.read_text()), within)
        todo += [m for m in imports if m.split(".")[0] == package]
    return found


def _file(module: str) -> Path | None:
    """The source of a module; None for what is no module, such as a name that one holds."""
    try:
        spec = find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _imports(tree: ast.AST, within: str) -> Iterator[str]:
    """Modules that code imports, also inside functions, but not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = within.split(".")[: len(within.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)
        else:
            yield from _imports(node, within)


def _code(text: str) -> str:
    """Code without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body:
            node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
