"""What is installed is what is in the tree, and it imports beside Hugging Face's package `kernels`.

transformers imports that package, whose name is also a folder of ours; these tests run real
interpreters from the root of the repository, where the two meet.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "trainer", "data", "eval", "benchmarks")
# For readers of the repository; nothing opens these at run time.
NOT_SHIPPED = {".md", ".png", ".svg"}

if not (ROOT / ".git").exists():
    pytest.skip("the tree is compared with what git tracks", allow_module_level=True)


def files_in_git(root: Path) -> list[str]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted({name for name in output.split("\0") if name and (root / name).is_file()})


def wheel_contents(root: Path, scratch: Path) -> set[str]:
    """The files of a wheel built from a copy of what is in git: building writes into its folder."""
    tree = scratch / "tree"
    for name in files_in_git(root):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tree / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wheel_problems(root: Path, scratch: Path) -> list[str]:
    contents = {name for name in wheel_contents(root, scratch) if ".dist-info/" not in name}
    expected = {
        f"longcot/{name}"
        for name in files_in_git(root)
        if name.split("/")[0] in FOLDERS and Path(name).suffix not in NOT_SHIPPED
    }
    missing = [f"{name} is not in the wheel: see setup.py" for name in sorted(expected - contents)]
    return missing + [f"{name} is not in git" for name in sorted(contents - expected)]


def test_the_wheel_holds_exactly_the_tree(tmp_path):
    assert wheel_problems(ROOT, tmp_path) == []


def test_a_file_that_the_wheel_lacks_is_found(tmp_path):
    root = tmp_path / "planted"
    for name in ("setup.py", "pyproject.toml", ".gitignore"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for folder in FOLDERS:
        (root / folder).mkdir()
        (root / folder / "module.py").touch()
    (root / "eval" / "tasks").mkdir()
    (root / "eval" / "tasks" / "page.html").touch()
    (root / "data" / "corpus.bin").touch()
    (root / "data" / "README.md").touch()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    problems = wheel_problems(root, tmp_path / "scratch")
    assert problems == ["longcot/data/corpus.bin is not in the wheel: see setup.py"]


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", ".ci"])
def test_git_ignores_none_of_our_folders(folder):
    command = ["git", "check-ignore", "--quiet", "--no-index", f"{folder}/new.py"]
    assert subprocess.run(command, cwd=ROOT).returncode == 1


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True
    )


def test_hugging_face_kernels_wins_over_our_folder():
    result = python(
        "import importlib.util, kernels, longcot.kernels\n"
        "print(importlib.util.find_spec('kernels').origin)\n"
        "print(longcot.kernels.__path__[0])\n"
    )
    assert result.returncode == 0, result.stderr
    theirs, ours = result.stdout.splitlines()
    site_packages = Path(sysconfig.get_path("purelib"))
    assert Path(theirs).is_relative_to(site_packages), f"{theirs} is not Hugging Face's kernels"
    assert Path(ours).name == "kernels" and not Path(ours).is_relative_to(site_packages)


@pytest.mark.parametrize("first", ["longcot.kernels", "transformers"])
def test_transformers_models_import_from_the_root(first):
    # The model is what pulls in `from kernels import ...`; `import transformers` alone is lazy.
    result = python(f"import {first}\nfrom transformers import Qwen3ForCausalLM\nimport kernels")
    assert result.returncode == 0, result.stderr


def test_an_init_file_would_be_noticed(tmp_path):
    """The fault that the two tests above guard against, planted in a folder of its own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(tmp_path / "kernels" / "__init__.py")


def test_the_trainer_says_how_to_install_longcot():
    # -S leaves out the .pth files of site-packages, and with them only our editable install.
    result = python(
        "import runpy, sys\n"
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "sys.path[0] = 'trainer'\n"
        "sys.argv = ['trainer/main.py']\n"
        "runpy.run_path('trainer/main.py', run_name='__main__')\n",
        "-S",
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "pip install -e ." in result.stderr
