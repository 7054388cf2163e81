"""Every task that can be asked for, by name."""

from .countdown import COUNTDOWN
from .tasks import Task

TASKS: dict[str, Task] = {task.name: task for task in (COUNTDOWN,)}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are: {', '.join(sorted(TASKS))}")
    return TASKS[name]
