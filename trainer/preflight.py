"""Can this machine run longcot? Asked by the Makefile before it creates anything.

    python trainer/preflight.py cpu    before installing for a machine without a GPU
    python trainer/preflight.py gpu    before installing for a machine with one
    python trainer/preflight.py run    before a run

Prints one sentence per obstacle (what was found, the rule, the remedy) and then exits with code 1.
Standard library only, and Python 3.6 must parse it: a wrong Python is one of the obstacles.
"""

import os
import platform
import shlex
import shutil
import sys
from typing import Callable, List, Optional, Tuple

GIB = 2**30
SUPPORTED_PYTHONS = ((3, 11), (3, 12))
SUPPORTED_MACHINES = ("x86_64", "aarch64")  # what vLLM publishes wheels for
COMPILERS = ("cc", "gcc", "clang")
MIN_CORES = 2
MIN_MEMORY_BYTES = 6 * GIB
# cpu: .venv measures 3.9 GiB with the development tools, and pip keeps what it downloads.
MIN_DISK_BYTES = {"cpu": 6 * GIB, "gpu": 25 * GIB, "run": 1 * GIB}


def python_problem(version: Tuple[int, int], executable: str) -> Optional[str]:
    if tuple(version[:2]) in SUPPORTED_PYTHONS:
        return None
    return (
        "{} is Python {}.{}, but longcot needs Python 3.11 or 3.12: install one, or name it "
        "with `make PYTHON=/path/to/python3.12`.".format(executable, version[0], version[1])
    )


def platform_problem(system: str, machine: str) -> Optional[str]:
    if system == "Linux" and machine in SUPPORTED_MACHINES:
        return None
    return (
        "This machine is {} on {}, but vLLM is published for Linux on {} only: use such a "
        "machine, or a container or virtual machine (WSL 2 on Windows).".format(
            system, machine, " and ".join(SUPPORTED_MACHINES)
        )
    )


def venv_problem(has_ensurepip: bool, executable: str, version: Tuple[int, int]) -> Optional[str]:
    if has_ensurepip:
        return None
    return (
        "{} cannot make a virtual environment, for its venv or ensurepip module is missing: "
        "install it (Debian and Ubuntu: `apt install python{}.{}-venv`), or name another Python "
        "with `make PYTHON=/path/to/python3.12`.".format(executable, version[0], version[1])
    )


def compiler_problem(
    cc: str,  # $CC, or "" when it is not set
    which: Callable[[str], Optional[str]] = shutil.which,
) -> Optional[str]:
    if cc:
        command = shlex.split(cc)[0]  # CC="ccache gcc" is usual
        if which(command):
            return None
        return (
            "CC is set to {!r}, which is not an executable, but Triton and torch.compile need a "
            "C compiler: correct CC or unset it.".format(cc)
        )
    if any(which(name) for name in COMPILERS):
        return None
    return (
        "No C compiler ({}) is on the PATH, but Triton and torch.compile need one: install one "
        "(Debian and Ubuntu: `apt install build-essential`), or name it with CC.".format(
            ", ".join(COMPILERS)
        )
    )


def cores_problem(num_cores: float) -> Optional[str]:
    if num_cores >= MIN_CORES:
        return None
    return (
        "This process may use {:g} processor core(s), but longcot needs at least {}: raise the "
        "limit of the container or the affinity mask, or use a larger machine.".format(
            num_cores, MIN_CORES
        )
    )


def memory_problem(memory_bytes: int) -> Optional[str]:
    if memory_bytes >= MIN_MEMORY_BYTES:
        return None
    return (
        "This process may use {:.1f} GiB of memory, but longcot needs at least {} GiB: raise the "
        "limit of the container, or use a larger machine.".format(
            memory_bytes / GIB, MIN_MEMORY_BYTES // GIB
        )
    )


def folder_problem(folder: str, is_writable: bool) -> Optional[str]:
    if is_writable:
        return None
    return (
        "The folder {} is not writable, but .venv and runs are made in it: change its "
        "permissions or mount, or clone the repository elsewhere.".format(folder)
    )


def disk_problem(folder: str, free_bytes: int, needed_bytes: int) -> Optional[str]:
    if free_bytes >= needed_bytes:
        return None
    return (
        "The disk that holds {} has {:.1f} GiB free, but {:g} GiB are needed: free some space, "
        "or clone the repository on a larger disk.".format(
            folder, free_bytes / GIB, needed_bytes / GIB
        )
    )


def cgroup_folders(
    membership: str,  # text of /proc/self/cgroup
    root: str = "/sys/fs/cgroup",
) -> List[str]:
    """The cgroup v2 folders whose limits bind this process: its own and all above it."""
    for line in membership.splitlines():
        if line.startswith("0::"):
            parts = [part for part in line[3:].strip().split("/") if part not in ("", "..")]
            return [os.path.join(root, *parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []


def cgroup_values(folders: List[str], name: str) -> List[str]:
    """The contents of file `name` in those folders that have it; the topmost often does not."""
    paths = [os.path.join(folder, name) for folder in folders]
    values = []
    for path in paths:
        if os.path.isfile(path):
            with open(path) as file:
                values.append(file.read().strip())
    return values


def core_limit(
    num_available: int,
    cpu_max: List[str],  # texts such as "max 100000" or "150000 100000": quota and period
) -> float:
    limits = [float(num_available)]
    for text in cpu_max:
        quota, period = text.split()
        if quota != "max":
            limits.append(int(quota) / int(period))
    return min(limits)


def memory_limit(
    installed_bytes: int,
    memory_max: List[str],  # texts such as "max" or "8589934592"
) -> int:
    return min([installed_bytes] + [int(text) for text in memory_max if text != "max"])


def installed_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def own_cgroup_folders() -> List[str]:
    if not os.path.isfile("/proc/self/cgroup"):
        return []
    with open("/proc/self/cgroup") as file:
        return cgroup_folders(file.read())


def has_ensurepip() -> bool:
    # Debian moves ensurepip into a package of its own; there `import venv` alone still succeeds.
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def problems(stage: str, folder: str) -> List[str]:
    version = (sys.version_info[0], sys.version_info[1])
    found = [
        python_problem(version, sys.executable),
        platform_problem(platform.system(), platform.machine()),
        venv_problem(has_ensurepip(), sys.executable, version),
        compiler_problem(os.environ.get("CC", "")),
        folder_problem(folder, os.access(folder, os.W_OK | os.X_OK)),
        disk_problem(folder, shutil.disk_usage(folder).free, MIN_DISK_BYTES[stage]),
    ]
    if platform.system() == "Linux":  # elsewhere the platform is obstacle enough
        cgroups = own_cgroup_folders()
        num_available = len(os.sched_getaffinity(0))
        found.append(cores_problem(core_limit(num_available, cgroup_values(cgroups, "cpu.max"))))
        found.append(
            memory_problem(
                memory_limit(installed_memory_bytes(), cgroup_values(cgroups, "memory.max"))
            )
        )
    return [problem for problem in found if problem is not None]


def main(arguments: List[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in MIN_DISK_BYTES:
        sys.stderr.write("usage: python trainer/preflight.py cpu|gpu|run\n")
        return 2
    found = problems(arguments[0], os.getcwd())
    for problem in found:
        sys.stderr.write("longcot cannot start here. " + problem + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
