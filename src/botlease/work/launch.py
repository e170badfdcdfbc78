"""The process of a bot that is started ahead (:mod:`.ahead`): ``launch.py NAME FD [-m MODULE | SCRIPT] ARGUMENT...``

It is run by its path, in the bot's own interpreter, where there need be no botlease. It waits on the descriptor for the
reaper's word; the end of file says that no bot is wanted any more. Then it does what the interpreter does with a script
or a module (``Modules/main.c`` of CPython), so that the bot sees no difference: a ``__main__`` of its own,
``sys.argv``, ``sys.orig_argv``, ``sys.path``, and no line of ours in a traceback.
"""

import marshal
import os
import sys

WAITING = "botlease-spare"
"""The name of the process as long as nothing of the bot's runs in it; the local check goes by it."""
MODULE = {k: v for k, v in globals().items() if k in ("__annotations__", "__builtins__", "__cached__")}
"""What the interpreter has given its main module, besides the names that every module has."""


def wait(fd: int) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """The order, and the descriptors that came along, by their names."""
    from _socket import AF_UNIX, CMSG_SPACE, SOCK_STREAM, socket  # without the Python around it, which is a megabyte

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


def run(words: list[str]) -> None:
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__.update(MODULE)
    here = os.getcwd()  # noqa: PTH109 - as little as can be is loaded besides what the bot loads
    if words[0] == "-m":
        import runpy

        if not sys.flags.safe_path:
            sys.path.insert(0, here)
        sys.argv[:] = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined] # what the interpreter itself calls
        return
    script = words[0]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(script)))  # noqa: PTH120
    sys.argv[:] = words
    path = script if script.startswith("/") else f"{here}/{script}"
    try:
        with open(path, "rb") as f:  # noqa: PTH123
            source = f.read()
    except OSError as e:
        sys.stderr.write(f"{sys.orig_argv[0]}: can't open file {path!r}: [Errno {e.errno}] {e.strerror}\n")
        raise SystemExit(2) from None
    main.__file__ = path
    main.__loader__ = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - it is what was asked for


def launch() -> None:
    rename(WAITING)
    name, fd, *words = sys.argv[1:]
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this file
    if words[0] == "-m":
        import runpy  # noqa: F401 - the interpreter would have loaded it before anything of the bot's
    try:
        order, fds = wait(int(fd))
    except KeyboardInterrupt:
        os._exit(130)
    if "stdout" in fds:
        os.dup2(fds["stdout"], 1)
        os.close(fds["stdout"])
    os.environ.update(order["env"])
    at = sys.orig_argv.index(sys.argv[0])
    del sys.orig_argv[at : at + 3]
    rename(name)
    try:
        run(words)
    except Exception as e:
        trace = e.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(e), e.with_traceback(trace), trace)
        raise SystemExit(1) from None


if __name__ == "__main__":
    launch()
