"""Digests of the code that timings depend on, by method: files are found from what they import.

The timing of a layer depends on the engine of its device, on how a layer runs, and on the methods
of its heads: on their files, and on all that these import from `attnplan.kernels`, late imports
included. Imports for types alone do not count, and neither do comments, docstrings and empty lines.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = "attnplan.kernels"
LAYER = "attnplan.kernels.layer.layer_attention"
STORE = "attnplan.kernels.kv_cache.layer_cache"
COMPILED = "attnplan.kernels.native.build"
"""Comes with all C++ sources beside it."""
CPU = ("attnplan.kernels.engines.cpu.prefill", "attnplan.kernels.engines.cpu.decode", COMPILED)
"""Not read on a GPU."""


def layer_digest(device: str, methods: Iterable[type] = ()) -> str:
    """Digest of what the timing of a layer depends on, 16 hexadecimal digits.

    Args:
        device: 'cpu' or 'cuda'.
        methods: the classes of its selectors and compressors.
    """
    return _digest(device, frozenset({LAYER, *(method.__module__ for method in methods)}))


def decode_digest(device: str, keepers: Iterable[type] = ()) -> str:
    """Digest of what the timing of decoding depends on, 16 hexadecimal digits.

    Args:
        device: 'cpu' or 'cuda'.
        keepers: the classes of what is kept.
    """
    return _digest(device, frozenset({STORE, *(keeper.__module__ for keeper in keepers)}))


def files_of(device: str, modules: Iterable[str]) -> list[Path]:
    """The files that some modules rest on, themselves among them, in the order of their names."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or not _counts(device, module):
            continue
        found.add(module)
        waiting += _imports(module)
    files = [_file(module) for module in sorted(found)]
    if COMPILED in found:
        beside = _file(COMPILED).parent
        files += sorted(path for kind in ("*.cpp", "*.h") for path in beside.glob(kind))
    return files


@cache
def _digest(device: str, modules: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for path in files_of(device, modules):
        digest.update(f"{path.name}\0{_code(path)}\0".encode())
    return digest.hexdigest()[:16]


def _counts(device: str, module: str) -> bool:
    if device == "cuda":
        return module not in CPU
    return not _imports_triton(module)


def _file(module: str) -> Path:
    inside = module.removeprefix(f"{PACKAGE}.").replace(".", "/")
    return Path(__file__).parent / f"{inside}.py"


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of this package that a module imports, wherever in its file."""
    named = set(_imported(ast.parse(_text(_file(module)))))
    return frozenset(name for name in named if name.startswith(PACKAGE) and _file(name).is_file())


@cache
def _imports_triton(module: str) -> bool:
    return "triton" in _imported(ast.parse(_text(_file(module))))


def _imported(node: ast.AST) -> Iterator[str]:
    """What is imported for more than types: modules, and names of modules as if they were some."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        inside: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside = node.orelse
        for child in inside:
            yield from _imported(child)


@cache
def _code(path: Path) -> str:
    """A file as the compiler sees it: without comments, docstrings and empty lines."""
    text = _text(path)
    if path.suffix != ".py":
        return text
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
