"""Names and sizes of files: nothing shadows what we import, and no file outgrows its reader.

`torchrun trainer/main.py` puts trainer/ first on sys.path, so a trainer/profile.py would become the
`profile` that torch imports; and Hugging Face's `kernels` must win over our folder of that name.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "trainer", "data", "eval", "benchmarks")
MAX_LINES = 450
# Modules named after nothing collect everything.
VAGUE_STEMS = {"utils", "util", "common", "base", "helpers", "misc"}
# Import names that differ from the names in setup.py, and packages that our dependencies import.
OTHER_IMPORT_NAMES = {
    "datasets", "evaluate", "flash_attn", "jinja2", "kernels", "math_verify", "openai", "pandas",
    "pyarrow", "requests", "rich", "sympy", "tensorboard", "tokenizers", "torchao", "torchvision",
    "triton_kernels", "vllm", "wandb", "yaml",
}  # fmt: skip


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def declared_import_names(setup_file: Path) -> set[str]:
    """Every requirement string in setup.py, as the name that one imports."""
    strings = {
        node.value
        for node in ast.walk(ast.parse(setup_file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    requirement = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)\s*(?:[<>=!~;].*)?")
    names = {match[1] for text in strings if (match := requirement.fullmatch(text))}
    return {name.replace("-", "_").lower() for name in names} - {"longcot", *FOLDERS}


def init_problems(root: Path) -> list[str]:
    return [
        f"{folder}/__init__.py would shadow an installed package called {folder}"
        for folder in (*FOLDERS, "tests")
        if (root / folder / "__init__.py").exists()
    ]


def name_problems(root: Path) -> list[str]:
    dependencies = declared_import_names(root / "setup.py") | OTHER_IMPORT_NAMES
    problems = []
    for path in python_files(root, *FOLDERS):
        name = path.relative_to(root).as_posix()
        if path.stem in sys.stdlib_module_names:
            problems.append(f"{name} is named like a module of the standard library")
        if path.stem in dependencies:
            problems.append(f"{name} is named like a dependency")
        if path.stem in VAGUE_STEMS:
            problems.append(f"{name} is named after nothing: say what it holds")
    return problems


def length_problems(root: Path) -> list[str]:
    problems = []
    for path in (root / "setup.py", *python_files(root, *FOLDERS, "tests")):
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_LINES:
            name = path.relative_to(root).as_posix()
            problems.append(f"{name} has {num_lines} lines, more than {MAX_LINES}: divide it")
    return problems


@pytest.mark.parametrize("check", [init_problems, name_problems, length_problems])
def test_this_repository(check):
    assert check(ROOT) == []


@pytest.fixture
def planted(tmp_path):
    """A small sound tree, to which each test adds one fault."""
    (tmp_path / "setup.py").write_text('setup(install_requires=["torch>=2.11,<2.16", "tyro"])\n')
    for folder in (*FOLDERS, "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "trainer" / "loop.py").write_text("steps = 1\n" * MAX_LINES)
    assert init_problems(tmp_path) + name_problems(tmp_path) + length_problems(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_a_top_level_init_is_found(planted, folder):
    (planted / folder / "__init__.py").touch()
    assert len(init_problems(planted)) == 1


@pytest.mark.parametrize(
    "name, reason",
    [
        ("trainer/profile.py", "standard library"),
        ("trainer/parallel/logging.py", "standard library"),
        ("data/tyro.py", "dependency"),
        ("data/datasets.py", "dependency"),
        ("kernels/kernels.py", "dependency"),
        ("eval/utils.py", "after nothing"),
        ("benchmarks/common.py", "after nothing"),
    ],
)
def test_a_shadowing_or_vague_name_is_found(planted, name, reason):
    (planted / name).parent.mkdir(exist_ok=True)
    (planted / name).touch()
    (problem,) = name_problems(planted)
    assert problem.startswith(name) and reason in problem


@pytest.mark.parametrize("name", ["trainer/loop.py", "tests/test_loop.py"])
def test_a_long_file_is_found(planted, name):
    (planted / name).write_text("steps = 1\n" * (MAX_LINES + 1))
    (problem,) = length_problems(planted)
    assert problem.startswith(name)


def test_dependencies_are_read_from_setup_py():
    names = declared_import_names(ROOT / "setup.py")
    assert {"torch", "triton", "transformers", "liger_kernel", "vllm", "pytest"} <= names
