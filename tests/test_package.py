"""Folders, imports and the installation stay in step."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from attnplan.kernels import cache_catalog, catalog

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
TOP = ("kernels", "profiles", "search", "planner")
SEEN = {
    "kernels": {"kernels"},
    "profiles": {"kernels", "profiles"},
    "search": {"kernels", "profiles", "search"},
}
IMPORTERS = {
    "transformers": {
        "profiles/capture/capture.py",
        "planner/models/adapters.py",
        "planner/runtime/adoption.py",
        "planner/models/attention_sites.py",
        "planner/cli/console.py",
        "planner/costs/decode.py",
        "planner/runtime/encoder.py",
        "planner/models/example_input.py",
        "planner/runtime/following.py",
        "planner/models/load.py",
        "planner/runtime/own_configurations.py",
        "planner/runtime/patch.py",
        "planner/runtime/proof.py",
        "planner/runtime/cache.py",
        "planner/quality/continuation.py",
        "planner/runtime/attention.py",
    },
    "sqlalchemy": {
        "profiles/store/database.py",
        "profiles/store/queries.py",
        "profiles/store/tables.py",
        "profiles/store/migrations/engine.py",
        "profiles/store/migrations/versions/*.py",
    },
    "alembic": {
        "profiles/store/migrations/engine.py",
        "profiles/store/migrations/env.py",
        "profiles/store/migrations/versions/*.py",
    },
    "optuna": {"search/study.py"},
    "triton": {"kernels/engines/gpu/*.py"},
    "yaml": {"planner/plan/located_yaml.py"},
    "typer": {"planner/cli/*.py"},
    "rich": {"planner/cli/console.py"},
}
"""A reader knows where to look, and a version break has one address."""
METHODS = ("kernels/selectors", "kernels/compressors")
CATALOGS: dict[str, Iterable[type]] = {
    "kernels/selectors": catalog.NEAR.values(),
    "kernels/compressors": catalog.FAR.values(),
    "kernels/cache_policies": cache_catalog.KEEPERS.values(),
}
LOOSE = 6
"""Files in kernels/ itself, at most: catalogs and what they share."""
TWICE = {
    "Choice",
    "Corrections",
    "Entry",
    "ModelIdentity",
    "Observed",
    "Outcome",
    "Past",
    "Recent",
    "Row",
}
"""Classes of one name in several files, which are to get names of their own."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{where(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """The contracts of pyproject.toml, over every file: a linter that sees none finds no fault."""
    from importlinter import cli

    kept = cli.lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0
    told = capsys.readouterr().out
    assert kept, told
    seen = re.search(r"Analyzed (\d+) files, (\d+) dependencies", told)
    assert seen is not None and int(seen[1]) >= len(sources(*TOP)), told


def test_every_folder_with_code_is_a_package() -> None:
    found = {where(path.parent) for path in sources(*TOP)}
    assert found == set(FOLDERS.values())
    assert set(SETUPTOOLS["packages"]) == set(FOLDERS)


@pytest.mark.parametrize(("package", "folder"), FOLDERS.items())
def test_every_file_is_installed_and_imports(package: str, folder: str) -> None:
    on_disk = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    path = importlib.import_module(package).__path__
    installed = {module.name for module in pkgutil.iter_modules(path) if not module.ispkg}
    assert on_disk == installed, "run `pip install -e .` again"
    # Alembic alone can run env.py, and __main__ would start the command line
    for name in sorted(on_disk - {"env", "__main__"}):
        importlib.import_module(f"{package}.{name}")


@pytest.mark.parametrize(("package", "patterns"), SETUPTOOLS["package-data"].items())
def test_data_files_are_installed(package: str, patterns: list[str]) -> None:
    on_disk = {path.name for p in patterns for path in (ROOT / FOLDERS[package]).glob(p)}
    parts = map(Path, importlib.import_module(package).__path__)
    assert on_disk and on_disk <= {path.name for part in parts for path in part.iterdir()}


def test_folders_do_not_shadow_packages() -> None:
    """transformers imports Hugging Face's `kernels`: from the root it would find ours."""
    assert [where(path) for path in sources(*TOP) if path.name == "__init__.py"] == [
        "planner/__init__.py"
    ]


def test_no_file_has_the_name_of_a_standard_module() -> None:
    """Running a file puts its folder first on sys.path."""
    assert not {path.stem for path in sources(*TOP)} & set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", SEEN)
def test_imports_point_one_way(folder: str) -> None:
    for path in sources(folder):
        for name in imported(path):
            if name.split(".")[0] == "attnplan":
                assert name.split(".")[1] in SEEN[folder], f"{where(path)} imports {name}"
            assert name.split(".")[0] not in TOP, f"{where(path)} imports {name}"


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_is_imported_in_known_files_only(library: str) -> None:
    for path in sources(*TOP):
        if any(name.split(".")[0] == library for name in imported(path)):
            known = [p for p in IMPORTERS[library] if path.match(p)]
            assert known, f"{where(path)} imports {library}"


def test_only_the_catalog_names_methods() -> None:
    """A new method is one new file and its name in the catalog."""
    methods = {**catalog.NEAR, **catalog.FAR}
    classes = {cls.__name__ for cls in methods.values()}
    # 'dense' is a word of plan files, and 'window' a knob that several methods share
    names = set(methods) - {"dense", "window"}
    for path in sources(*TOP):
        if where(path.parent) in METHODS or path.name == "catalog.py":
            continue
        for name in imported(path):
            parts = name.removeprefix("attnplan.").split(".")
            # what begins with an underscore is a family of methods
            is_method = "/".join(parts[:2]) in METHODS and not parts[2].startswith("_")
            assert not is_method, f"{where(path)} imports {name}"
        for node in ast.walk(ast.parse(path.read_text())):
            word = node.value if isinstance(node, ast.Constant) else getattr(node, "id", None)
            assert not isinstance(word, str) or word not in names | classes, (
                f"{where(path)}, line {getattr(node, 'lineno', 0)}: {word}"
            )


@pytest.mark.parametrize("folder", CATALOGS)
def test_every_method_is_in_its_catalog(folder: str) -> None:
    """A file without underscore is one method; a forgotten line in the catalog shows here."""
    files = {path.stem for path in sources(folder) if not path.stem.startswith("_")}
    package = folder.replace("/", ".")
    assert {f"attnplan.{package}.{name}" for name in files} == {
        cls.__module__ for cls in CATALOGS[folder]
    }


def test_what_is_loose_in_kernels_is_little() -> None:
    loose = [where(path) for path in sources("kernels") if where(path.parent) == "kernels"]
    assert len(loose) <= LOOSE, loose


def test_public_classes_have_names_of_their_own() -> None:
    """Whoever searches for a class finds one."""
    names = Counter(
        node.name
        for path in sources(*TOP)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == TWICE


@pytest.mark.parametrize("command", ["import attnplan", "import attnplan.cli.app"])
def test_importing_the_package_is_light(command: str) -> None:
    """`attnplan --help` answers at once."""
    loaded = f"{command}, sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert "attnplan" in found
    assert not {"torch", "transformers", "optuna", "sqlalchemy", "sklearn"} & set(found)


def test_help_comes_without_what_commands_need() -> None:
    code = (
        "import sys; sys.argv = ['attnplan', '--help']\n"
        "from attnplan.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and "search" in found.stdout, found.stderr
    loaded = set(found.stdout.split())
    assert "attnplan.cli.app" in loaded
    assert not {"torch", "numpy", "sqlalchemy", "alembic", "rich.progress"} & loaded


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import attnplan

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = attnplan.nothing
