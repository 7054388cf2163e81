"""Who may import whom: the folders form a DAG, no modules form a cycle, each wall has one door.

    kernels        data
        \\         /    \\
         trainer        eval          (an arrow points to who may import)
             \\
          benchmarks
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "data": set(),
    "trainer": {"kernels", "data"},
    "eval": {"data"},
    "benchmarks": {"kernels", "data", "trainer"},
}
# torchrun starts this file as a script, so it has no package to be relative to.
SCRIPT = "trainer/main.py"
SAMPLER = "data/sampling.py"
KERNEL_LIBRARIES = {"torch", "triton", "liger_kernel", "flash_attn", "flash_attn_interface"}


@dataclass(frozen=True)
class Import:
    """One imported name, written `from ..data.packing import pack` in trainer/loop.py, say."""

    file: str  # "trainer/loop.py"
    line: int
    module: str  # "longcot.data.packing"
    name: str | None  # "pack"; None for `import module`
    is_relative: bool
    is_in_function: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_in(root: Path, path: Path) -> Iterator[Import]:
    file = path.relative_to(root)
    package = ("longcot", *file.parent.parts)

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file.as_posix(), node.lineno, alias.name, None, False, in_function)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                module = ".".join((*above, module)) if module else ".".join(above)
            for alias in node.names:
                yield Import(
                    file.as_posix(), node.lineno, module, alias.name, node.level > 0, in_function
                )
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or is_function)

    return visit(ast.parse(path.read_text()), False)


def all_imports(root: Path, *folders: str) -> list[Import]:
    return [
        found
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
        for found in imports_in(root, path)
    ]


def target_folder(found: Import) -> str | None:
    """The folder of ours that an import reaches, or None. `from .. import data` reaches data."""
    if found.top != "longcot":
        return None
    parts = [*found.module.split("."), *([found.name] if found.name else [])]
    return parts[1] if len(parts) > 1 else "longcot"


def layer_problems(root: Path) -> list[str]:
    problems = []
    for found in all_imports(root, *MAY_IMPORT):
        folder, target = found.file.split("/")[0], target_folder(found)
        if target is not None and target != folder and target not in MAY_IMPORT[folder]:
            problems.append(f"{found.place} imports {target}, which {folder} may not")
    return problems


def spelling_problems(root: Path) -> list[str]:
    problems = []
    for found in all_imports(root, *MAY_IMPORT, "tests"):
        if not found.is_relative and found.top in {*MAY_IMPORT, "tests"}:
            problems.append(
                f"{found.place} imports {found.top}, which is another package of that name or a "
                f"second copy of ours: import longcot.{found.module}, or relatively"
            )
        is_ours = not found.is_relative and found.top == "longcot"
        if is_ours and found.file != SCRIPT and not found.file.startswith("tests/"):
            problems.append(f"{found.place} imports {found.module}: import it relatively")
        if found.is_relative and found.file == SCRIPT:
            problems.append(f"{found.place} is relative, but torchrun starts {SCRIPT} as a script")
    return problems


def vllm_problems(root: Path) -> list[str]:
    problems = []
    for found in all_imports(root, *MAY_IMPORT):
        if found.top == "vllm" and found.file != SAMPLER:
            problems.append(f"{found.place} imports vllm: only {SAMPLER} talks to it")
        elif found.top == "vllm" and not found.is_in_function:
            problems.append(f"{found.place} imports vllm on import: do so in the function")
    return problems


def kernel_problems(root: Path) -> list[str]:
    allowed = {"longcot"} | KERNEL_LIBRARIES | sys.stdlib_module_names
    return [
        f"{found.place} imports {found.top}, but kernels know only torch, triton and the like"
        for found in all_imports(root, "kernels")
        if found.top not in allowed
    ]


def cycle_problems(root: Path) -> list[str]:
    modules = {
        ".".join(("longcot", *path.relative_to(root).with_suffix("").parts))
        for folder in MAY_IMPORT
        for path in (root / folder).rglob("*.py")
    }
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for found in all_imports(root, *MAY_IMPORT):
        importer = ".".join(("longcot", *Path(found.file).with_suffix("").parts))
        graph[importer] |= {found.module, f"{found.module}.{found.name}"} & modules
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["modules import each other: " + " <- ".join(error.args[1])]
    return []


CHECKS = [layer_problems, spelling_problems, vllm_problems, kernel_problems, cycle_problems]


@pytest.mark.parametrize("check", CHECKS)
def test_this_repository(check):
    assert check(ROOT) == []


SOUND = {
    "kernels/rms_norm.py": "import math\nimport torch\nimport triton.language as tl\n",
    "data/packing.py": "import numpy\n",
    "data/sampling.py": "from .packing import pack\ndef sample():\n    from vllm import LLM\n",
    "trainer/loop.py": "from ..kernels.rms_norm import rms_norm\nfrom ..data import packing\n",
    "trainer/main.py": "from longcot.trainer.loop import train\n",
    "eval/report.py": "from ..data.sampling import sample\n",
    "benchmarks/step.py": "from ..trainer.loop import train\n",
    "tests/test_loop.py": "from longcot.trainer.loop import train\nfrom longcot import eval\n",
}


@pytest.fixture
def planted(tmp_path):
    """A small sound tree, to which each test adds one fault."""
    for name, text in SOUND.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [problem for check in CHECKS for problem in check(tmp_path)] == []
    return tmp_path


@pytest.mark.parametrize(
    "check, file, fault",
    [
        (layer_problems, "kernels/rope.py", "from ..trainer.loop import train"),
        (layer_problems, "kernels/rope.py", "from .. import data"),
        (layer_problems, "kernels/rope.py", "import longcot.data.packing"),
        (layer_problems, "data/verify.py", "from ..kernels import rms_norm"),
        (layer_problems, "data/verify.py", "from longcot import trainer"),
        (layer_problems, "eval/scores.py", "def f():\n    from ..trainer.loop import train"),
        (layer_problems, "eval/tasks/aime.py", "from ...trainer.loop import train"),
        (layer_problems, "trainer/mesh.py", "from ..benchmarks.step import measure"),
        (layer_problems, "trainer/mesh.py", "from ..eval.report import write"),
        (spelling_problems, "trainer/mesh.py", "from longcot.data.packing import pack"),
        (spelling_problems, "trainer/mesh.py", "import kernels.rms_norm"),
        (spelling_problems, "trainer/mesh.py", "from data import packing"),
        (spelling_problems, "tests/test_mesh.py", "from trainer.loop import train"),
        (spelling_problems, "trainer/main.py", "from .loop import train"),
        (vllm_problems, "eval/scores.py", "def f():\n    import vllm"),
        (vllm_problems, "data/sampling.py", "from vllm import LLM"),
        (vllm_problems, "data/sampling.py", "class Sampler:\n    import vllm.engine"),
        (kernel_problems, "kernels/rope.py", "import numpy"),
        (kernel_problems, "kernels/rope.py", "def f():\n    from transformers import AutoModel"),
        (cycle_problems, "data/packing.py", "from .sampling import sample"),
        (cycle_problems, "data/packing.py", "def f():\n    from . import sampling"),
        (cycle_problems, "data/packing.py", "from . import packing"),
    ],
)
def test_a_planted_fault_is_found(planted, check, file, fault):
    (planted / file).parent.mkdir(exist_ok=True)
    (planted / file).write_text(fault + "\n")
    assert len(check(planted)) == 1
