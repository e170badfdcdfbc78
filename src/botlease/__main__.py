"""The way in: ``botlease`` and ``python -m botlease``.

``run`` forks its reaper here, before the command line is even read: whatever is loaded before the fork is memory of
both processes. Then it forks who reads the command line. If that turns out wrong, the reaper ends with us.
"""

from __future__ import annotations

import gc
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any, NoReturn
else:  # as in the reaper, which is forked from here
    import _signal as signal


def main(prog_name: str | None = None) -> None:
    program = prog_name or "botlease"
    if sys.argv[1:2] == ["run"]:
        # Nothing of what is loaded is garbage, and to look for some took 7 to 10 ms of a start of 115 (measured, old
        # and new in turn). The supervisor collects again as soon as it has loaded what it needs.
        gc.disable()
        from botlease.work import reaper

        # As PID 1 the kernel drops a SIGTERM for which there is no handler, and a container that is stopped while it
        # starts would go on, claim, and be killed with the lease in its hand. Nothing has begun: to end is all there is
        # to do. The supervisor has handlers of its own from run.py on.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        reaper.fork_early()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some start us, we could not see how the fork ended
        reading = _read_apart(program)
        try:
            from botlease.exits import leave
            from botlease.start import load_early, start

            if reading is not None:
                load_early(sys.argv, os.environ)
                leave(start(**reading()))
        except KeyboardInterrupt:  # before there is a supervisor with handlers of its own
            os._exit(130)
    from botlease.cli import main as commands
    from botlease.console import invoke

    invoke(commands, program)


def _read_apart(program: str) -> Callable[[], dict[str, Any]] | None:
    """Have a fork of us read the command line: a supervisor never needs again what that takes, 1.5 MB and 20 ms, and
    meanwhile loads what it does need (old and new in turn: a start of 102 to 110 ms takes 88 to 94 on SQLite). What is
    returned waits for the options of ``run``; if there are none, as after --help, it ends as the fork has ended. None:
    nothing can be forked."""
    me = os.getpid()
    read, write = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        return None
    if pid == 0:
        os.close(read)
        _read_and_end(program, me, write)
    os.close(write)

    def options() -> dict[str, Any]:
        with open(read, "rb") as pipe:  # noqa: PTH123 - a descriptor
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status or not data:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        found: dict[str, Any] = marshal.loads(data)  # noqa: S302 - from a fork of ourselves
        return found

    return options


def _read_and_end(program: str, supervisor: int, write: int) -> NoReturn:
    from botlease.exits import leave
    from botlease.work import tree

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ours would look like an end without options
    # It has the line to the reaper as well, which would not see the supervisor end as long as we are there.
    tree.prctl(tree.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(70)

    def deliver(options: dict[str, Any]) -> None:
        with open(write, "wb") as pipe:
            pipe.write(marshal.dumps(options))

    code = 70
    try:
        from botlease.cli import main as commands
        from botlease.console import invoke

        invoke(commands, program, deliver)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    leave(code)


if __name__ == "__main__":
    main()
