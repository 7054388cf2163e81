"""trainer/preflight.py: every obstacle is one sentence, and no more than that is refused."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longcot.trainer import preflight

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "trainer" / "preflight.py"
GIB = preflight.GIB


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_supported_pythons_pass(version):
    assert preflight.python_problem(version, "python3") is None


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 13), (4, 11)])
def test_other_pythons_are_named(version):
    problem = preflight.python_problem(version, "/opt/python3")
    assert problem is not None
    assert f"/opt/python3 is Python {version[0]}.{version[1]}" in problem
    assert "make PYTHON=" in problem


@pytest.mark.parametrize(
    "system, machine, passes",
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_platforms(system, machine, passes):
    problem = preflight.platform_problem(system, machine)
    assert (problem is None) == passes
    assert passes or f"{system} on {machine}" in str(problem)


def test_a_missing_venv_module_names_the_package_that_has_it():
    assert preflight.venv_problem(True, "python3", (3, 11)) is None
    assert "python3.11-venv" in str(preflight.venv_problem(False, "python3", (3, 11)))


@pytest.mark.parametrize(
    "cc, installed, passes",
    [
        ("", {"cc"}, True),
        ("", {"clang"}, True),
        ("", set(), False),
        ("gcc-13", {"gcc-13"}, True),
        ("ccache gcc", {"ccache", "gcc"}, True),
        # A wrong CC is an obstacle although another compiler exists: Triton would take CC.
        ("icc", {"gcc"}, False),
    ],
)
def test_compilers(cc, installed, passes):
    problem = preflight.compiler_problem(cc, lambda name: name if name in installed else None)
    assert (problem is None) == passes
    assert passes or (cc or "build-essential") in str(problem)


@pytest.mark.parametrize("num_cores, passes", [(1, False), (1.5, False), (2, True), (64, True)])
def test_cores(num_cores, passes):
    problem = preflight.cores_problem(num_cores)
    assert (problem is None) == passes
    assert passes or f"may use {num_cores} processor" in str(problem)


def test_memory_and_disk_name_what_was_found_and_the_rule():
    assert preflight.memory_problem(6 * GIB) is None
    memory = str(preflight.memory_problem(6 * GIB - GIB // 10))
    assert "5.9 GiB" in memory and "6 GiB" in memory
    assert preflight.disk_problem("/repo", 8 * GIB, 8 * GIB) is None
    disk = str(preflight.disk_problem("/repo", 3 * GIB, 8 * GIB))
    assert "/repo" in disk and "3.0 GiB" in disk and "8 GiB" in disk


def test_an_unwritable_folder_is_named():
    assert preflight.folder_problem("/repo", True) is None
    assert "/repo is not writable" in str(preflight.folder_problem("/repo", False))


@pytest.mark.parametrize(
    "num_available, cpu_max, expected",
    [
        (8, [], 8),
        (8, ["max 100000"], 8),
        (8, ["150000 100000", "max 100000"], 1.5),
        (8, ["max 100000", "400000 100000"], 4),  # a limit on the parent binds too
        (2, ["400000 100000"], 2),
    ],
)
def test_the_tightest_core_limit_holds(num_available, cpu_max, expected):
    assert preflight.core_limit(num_available, cpu_max) == expected


def test_the_tightest_memory_limit_holds():
    assert preflight.memory_limit(16 * GIB, []) == 16 * GIB
    assert preflight.memory_limit(16 * GIB, ["max", str(4 * GIB)]) == 4 * GIB
    assert preflight.memory_limit(2 * GIB, [str(4 * GIB)]) == 2 * GIB


def test_cgroup_limits_are_read_from_the_process_upwards(tmp_path):
    own = tmp_path / "user.slice" / "job"
    own.mkdir(parents=True)
    (own / "memory.max").write_text("max\n")
    (own.parent / "memory.max").write_text("1024\n")
    folders = preflight.cgroup_folders("4:memory:/v1\n0::/user.slice/job\n", str(tmp_path))
    assert folders == [str(own), str(own.parent), str(tmp_path)]
    assert preflight.cgroup_values(folders, "memory.max") == ["max", "1024"]
    assert preflight.cgroup_folders("4:memory:/v1\n") == []


def run_preflight(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_this_machine_passes_and_nothing_is_created(tmp_path):
    result = run_preflight("run", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_every_obstacle_is_printed_on_its_own_line(tmp_path):
    result = run_preflight("run", cwd=tmp_path, CC="no-such-compiler")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "'no-such-compiler'" in result.stderr


def test_an_unknown_stage_is_refused(tmp_path):
    assert run_preflight("demo", cwd=tmp_path).returncode == 2
    assert run_preflight(cwd=tmp_path).returncode == 2


def test_python_3_6_can_parse_it():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
