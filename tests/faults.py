"""Work in forks, and how it ends."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def start(work: Callable[[], object]) -> int:
    """Begin work in a fork, which exits with what it returns, 0 for None; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = int(work() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """How a fork has ended, as subprocess says it: a signal is below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], object]) -> int:
    return finish(start(work))
