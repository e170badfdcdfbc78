"""The process of a bot that is started ahead (:mod:`.ahead`): ``launch.py NAME FD [-m MODULE | SCRIPT] ARGUMENT...``

It is run by its path, in the bot's own interpreter, where there need be no botlease. It waits on the descriptor for the
reaper's word; the end of file says that no bot is wanted any more. Then it does what the interpreter does with a script
or a module (``Modules/main.c`` of CPython), so that the bot sees no difference: a ``__main__`` of its own,
``sys.argv``, ``sys.orig_argv``, ``sys.path``, its command line in ``ps``, and no line of ours in a traceback. What it
could find: two frames of ours below its own (``inspect.stack()[-1]``).
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import TracebackType
else:
    import _signal as signal  # without its enumerations

WAITING = "botlease-spare"
"""What ``ps`` shows as long as nothing of the bot's runs in this process; the local check goes by it."""
MODULE = {k: v for k, v in globals().items() if k in ("__annotations__", "__builtins__", "__cached__")}
"""What the interpreter has given its main module, besides the names that every module has."""


def wait(fd: int) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """The order, and the descriptors that came along, by their names; as :func:`.reaper.send` has packed them."""
    from _socket import AF_UNIX, CMSG_SPACE, SOCK_STREAM, socket  # without the Python around it

    line = socket(AF_UNIX, SOCK_STREAM, 0, fd)
    data = b""
    fds: list[int] = []
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        more, besides, _, _ = line.recvmsg(8192, CMSG_SPACE(16))
        if not more:
            os._exit(0)
        data += more
        for _, _, raw in besides:
            fds += [int.from_bytes(raw[i : i + 4], sys.byteorder) for i in range(0, len(raw), 4)]
    line.close()
    order = marshal.loads(data[4:])  # noqa: S302 - from the reaper, which forked us
    return order, dict(zip(order["fds"], fds, strict=True))


def rename(name: str) -> None:
    """As what ``ps`` and /proc show this process."""
    try:
        fd = os.open("/proc/self/comm", os.O_WRONLY)
    except OSError:  # there is no such thing on macOS
        return
    os.write(fd, os.fsencode(name))
    os.close(fd)


class Title:
    """The command line of this process, as ``ps`` and /proc show it: our own memory, which we may write. (As ``title``
    does with ctypes; that would be more memory.)"""

    def __init__(self) -> None:
        self.memory = -1
        try:
            with open("/proc/self/stat", "rb") as f:  # noqa: PTH123
                fields = f.read().rpartition(b")")[2].split()
            self.at, self.end = int(fields[45]), int(fields[46])
            self.memory = os.open("/proc/self/mem", os.O_WRONLY)
        except (OSError, ValueError, IndexError):  # no /proc, or a kernel that does not let us
            pass

    def show(self, words: list[str]) -> None:
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        if self.memory >= 0 and len(text) <= self.end - self.at:
            try:
                os.pwrite(self.memory, text.ljust(self.end - self.at, b"\0"), self.at)
            except OSError:
                pass

    def close(self) -> None:
        if self.memory >= 0:
            os.close(self.memory)


def run(words: list[str]) -> None:
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__.update(MODULE)
    if words[0] == "-m":
        import runpy

        if not sys.flags.safe_path:
            try:
                sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as little as can be is loaded besides what it loads
            except OSError:  # it was deleted meanwhile: the interpreter does without, too
                pass
        sys.argv[:] = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined] # what the interpreter itself calls
        return
    sys.argv[:] = words
    path = words[0]
    try:
        if not sys.flags.safe_path:
            sys.path.insert(0, os.path.dirname(os.path.realpath(path)))  # noqa: PTH120
        if not path.startswith("/"):
            path = f"{os.getcwd()}/{path}"  # noqa: PTH109
        with open(path, "rb") as f:  # noqa: PTH123
            source = f.read()
    except OSError as e:
        sys.stderr.write(f"{sys.orig_argv[0]}: can't open file {path!r}: [Errno {e.errno}] {e.strerror}\n")
        raise SystemExit(2) from None
    main.__file__ = path
    main.__loader__ = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - it is what was asked for


def leave_us_out() -> None:
    """Of the traceback that is about to be shown. The interpreter shows it, and ends as ever."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = shown
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        shown(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook


def launch() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is there yet that could be interrupted
    name, fd, *words = sys.argv[1:]
    title = Title()
    title.show([WAITING])
    rename(WAITING)
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this file
    if words[0] == "-m":
        import runpy  # noqa: F401 - the interpreter would have loaded it before anything of the bot's
    order, fds = wait(int(fd))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "stdout" in fds:
        os.dup2(fds["stdout"], 1)
        os.close(fds["stdout"])
    os.environ.update(order["env"])
    at = sys.orig_argv.index(sys.argv[0])
    del sys.orig_argv[at : at + 3]
    title.show(sys.orig_argv)
    title.close()
    rename(name)
    try:
        run(words)
    except SystemExit:
        raise
    except BaseException:
        leave_us_out()
        raise


if __name__ == "__main__":
    launch()
