"""The interpreter of a Python bot that is started while another one works: it waits, and then it is the bot."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from harness import Run, World, until
from reapers import Reaper, comm, gone

from botlease import local
from botlease.work import ahead

PYTHON = sys.executable
LOADED = frozenset(
    [
        "__future__",
        "_socket",
        "marshal",
        "os",
        "os.path",
        "posixpath",
        "genericpath",
        "stat",
        "_stat",
        "_collections_abc",
        "abc",
        "_abc",
        "encodings.ascii",
    ]
)
"""What may have been loaded besides what the bot loads; most of it is only so with -S."""
PROBE = r"""
import sys
loaded = sorted(sys.modules)
import json, os, signal
main = sys.modules["__main__"]
names = {k: v if v is None or isinstance(v, (str, dict)) else type(v).__name__
         for k, v in vars(main).items() if k.startswith("__")}
names.pop("__builtins__")
json.dump({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": list(sys.flags), "x": sys._xoptions,
    "warn": sys.warnoptions, "names": names, "executable": sys.executable, "prefix": sys.prefix,
    "loaded": loaded, "globals": sorted(globals()), "is main": globals() is vars(main), "cwd": os.getcwd(),
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "fds": sorted(os.listdir("/proc/self/fd")),
    "env": dict(os.environ), "comm": open("/proc/self/comm").read(), "buffered": sys.stdout.line_buffering,
    "through": sys.stdout.write_through, "core": __import__("resource").getrlimit(4),
    "own session": os.getsid(0) == os.getpid(), "stdin": sys.stdin.read(),
    "cmdline": open("/proc/self/cmdline").read().rstrip("\0"),
}, open(os.environ["RESULT"], "w"))
"""


@contextmanager
def errors_to(path: Path, given: str = "") -> Iterator[None]:
    """Standard error of what is forked meanwhile; and what is there on its standard input."""
    kept = [os.dup(fd) for fd in (0, 2)]
    with path.open("ab") as f, tempfile.TemporaryFile() as stdin:
        stdin.write(given.encode())
        stdin.seek(0)
        os.dup2(stdin.fileno(), 0)
        os.dup2(f.fileno(), 2)
    try:
        yield
    finally:
        for fd, was in zip((0, 2), kept, strict=True):
            os.dup2(was, fd)
            os.close(was)


def both(folder: Path, argv: Sequence[str], **env: str) -> list[dict[str, object]]:
    """What becomes of it, started by exec and started ahead."""
    out = []
    for kind in ("exec", "ahead"):
        said, result = folder / f"{kind}.out", folder / "result.json"
        for old in (said, result):
            old.unlink(missing_ok=True)
        with errors_to(said, given="what it is given"):
            r = Reaper()
        with closing(r), said.open("ab") as output:
            env = {"RESULT": str(result), "PYTHONDONTWRITEBYTECODE": "1"} | env
            spare = r.prepare_ahead(argv, **env) if kind == "ahead" else r.prepare(argv, **env)
            r.start({"stdout": output.fileno()}, BOTLEASE_TERM="7")
            assert r.says("started")["pid"] == spare or spare is None
            status = r.says("gone")["status"]
        more = json.loads(result.read_text()) if result.exists() else {}
        out.append({"status": status, "said": said.read_text(), **more})
    return out


def same(folder: Path, argv: Sequence[str], **env: str) -> dict[str, object]:
    """It cannot tell how it was started, and nobody can. Returns what it says."""
    plain, early = both(folder, argv, **env)
    there = set(early.pop("loaded", ())) - set(plain.pop("loaded", ()))
    assert there <= LOADED
    assert early == plain
    return plain


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a bot in it, as a script, a module and a package; the current one."""
    (tmp_path / "pack").mkdir()
    for name in ("bot.py", "pack/__main__.py"):
        (tmp_path / name).write_text(PROBE)
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "link.py").symlink_to("pack/__main__.py")
    for name, first in (("tool", PYTHON), ("tool-s", f"{PYTHON} -S")):
        (tmp_path / name).write_text(f"#!{first}\n{PROBE}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        "PY bot.py",
        "PY ./bot.py one --two",
        "PY HERE/bot.py",
        "PY pack/../bot.py -m",
        "PY link.py",
        "PY -m bot",
        "PY -m pack with words",
        "PY -u bot.py",
        "PY -I -S bot.py",
        "PY -I HERE/bot.py",
        "PY -P bot.py",
        "PY -OBs -W error::UserWarning -Xdev -X utf8=0 bot.py",
        "./tool word",
        "tool",
        "HERE/tool-s a b",
    ],
)
def test_a_program_that_was_started_ahead_cannot_tell(folder: Path, argv: str) -> None:
    words = argv.replace("PY", PYTHON).replace("HERE", str(folder)).split()
    found = same(folder, words, PATH=f"{folder}:{os.environ['PATH']}")
    assert found["status"] == 0 and found["is main"] and found["stdin"] == "what it is given"


def test_its_errors_look_as_ever_and_end_with_the_same_code(folder: Path) -> None:
    for text, status in (
        ("def f():\n    raise ValueError('so')\nf()", 1),
        ("try:\n    1 / 0\nexcept ArithmeticError as e:\n    raise RuntimeError('then') from e", 1),
        ("print('out', flush=True)\nif", 1),
        ("import sys\nsys.exit(9)", 9),
        ("raise SystemExit('why')", 1),
        ("import sys\nsys.excepthook = lambda *e: print('mine', e[1], e[2].tb_lineno)\nraise KeyError(1)", 1),
        (
            "import atexit, threading\natexit.register(print, 'end')\n"
            "threading.Timer(0.1, print, ['late']).start()\nraise OSError('first')",
            1,
        ),
        ("def f():\n    raise KeyboardInterrupt\nf()", -signal.SIGINT),
        ("import os\nos.kill(os.getpid(), 2)", -signal.SIGINT),
        ("import asyncio\nraise asyncio.CancelledError", 1),
        ("class E(BaseException): pass\nraise E('odd')", 1),
        ("import os\nos.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os\nos.abort()", -signal.SIGABRT),
    ):
        (folder / "bot.py").write_text(text)
        for argv in ((PYTHON, "bot.py"), (PYTHON, "-m", "bot")):
            found = same(folder, argv)
            assert found["status"] == status, found
            assert "launch" not in str(found["said"])
    assert "No module named nothing" in str(same(folder, (PYTHON, "-m", "nothing"))["said"])


def test_a_program_that_starts_others_of_itself_can_do_so(folder: Path) -> None:
    (folder / "bot.py").write_text(
        "import multiprocessing, subprocess, sys\n"
        "def work(n):\n"
        "    print(n, __name__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('spawn').Process(target=work, args=(1,))\n"
        "    p.start(); p.join()\n"
        "    if len(sys.argv) == 1:\n"  # as the reloaders of frameworks do
        "        subprocess.run([*sys.orig_argv, 'again'])\n"
    )
    assert str(same(folder, (PYTHON, "bot.py"))["said"]).count("__mp_main__") == 2
    assert str(same(folder, (PYTHON, "-m", "bot"))["said"]).count("__mp_main__") == 2


def test_a_script_that_is_gone_when_it_is_wanted_is_missed_as_ever(folder: Path) -> None:
    with errors_to(folder / "said"):
        r = Reaper()
    with closing(r):
        r.prepare_ahead((PYTHON, "bot.py"))
        (folder / "bot.py").unlink()
        r.start({})
        assert r.says("gone")["status"] == 2
    plain = subprocess.run((PYTHON, "bot.py"), capture_output=True, text=True)
    assert plain.returncode == 2 and (folder / "said").read_text() == plain.stderr


@pytest.mark.parametrize("argv", ["PY HERE/other.py", "PY -m other", "PY bot.py"])
def test_where_its_folder_was_deleted_meanwhile_it_does_what_the_interpreter_does(folder: Path, argv: str) -> None:
    """A release that is unpacked beside the old one, which is deleted then."""
    (folder / "other.py").write_text("print('runs')")
    words = argv.replace("PY", PYTHON).replace("HERE", str(folder)).split()
    out = []
    for early in (False, True):
        release, said = folder / "release", folder / f"said{early}"
        release.mkdir()
        (release / "bot.py").write_text("print('runs')")
        os.chdir(release)
        with errors_to(said):
            r = Reaper()
        with closing(r), said.open("ab") as output:
            r.prepare(words, early=early, PYTHONPATH=str(folder))
            until(lambda r=r, early=early: [comm(p) for p in r.children()] == ["botlease-spare"] or not early)
            shutil.rmtree(release)
            r.start({"stdout": output.fileno()})
            out.append((r.says("gone")["status"], said.read_text()))
        os.chdir(folder)
    assert out[1] == out[0] and (out[0] == (0, "runs\n") or argv == "PY bot.py")


def test_what_has_changed_while_it_waited_is_what_runs(folder: Path) -> None:
    with closing(Reaper()) as r, (folder / "said").open("wb") as said:
        r.prepare_ahead((PYTHON, "bot.py"))
        (folder / "bot.py").write_text("import other")
        (folder / "other.py").write_text("print('new')")
        r.start({"stdout": said.fileno()})
        assert r.says("gone")["status"] == 0
    assert (folder / "said").read_text() == "new\n"


@pytest.mark.parametrize(
    "argv",
    [
        "PY -c pass",
        "PY -i bot.py",
        "PY -x bot.py",
        "PY --check-hash-based-pycs always bot.py",
        "PY -",
        "PY",
        "PY -m",
        "PY -u",
        "PY pack",
        "PY bot.zip",
        "PY bot.pyc",
        "PY nothing.py",
        "PY empty.py",
        "./python bot.py",
        "python bot.py",
        "./old",
        "./broken",
        "nothing",
        "sh -c python",
    ],
)
def test_what_is_not_our_interpreter_with_a_program_is_not_started_ahead(folder: Path, argv: str) -> None:
    """A shim called python may do anything before it becomes one: it is not run while another one works."""
    (folder / "python").write_text(f'#!/bin/sh\ntouch {folder}/ran\nexec {PYTHON} "$@"\n')
    (folder / "old").write_text("#!/usr/bin/env python3\n" + PROBE)
    (folder / "broken").write_text("#!")
    for name in ("python", "old", "broken"):
        (folder / name).chmod(0o755)
    (folder / "empty.py").touch()
    with zipfile.ZipFile(folder / "bot.zip", "w") as z:
        z.writestr("__main__.py", PROBE)
    compileall.compile_file(folder / "bot.py", legacy=True, quiet=1)
    assert (folder / "bot.pyc").exists()
    words = argv.replace("PY", PYTHON).split()
    assert ahead.command(words, {"PATH": f"{folder}:/usr/bin:/bin"}) is None


def test_what_is_no_file_is_not_read(folder: Path) -> None:
    """A bot may come through a pipe: what we read of it would be lost, and where nothing comes we would wait."""
    os.mkfifo(folder / "fifo")
    (folder / "fifo").chmod(0o755)
    for words in ((PYTHON, "fifo"), ("./fifo",), (PYTHON, "/dev/tty"), (PYTHON, "/dev/stdin")):
        code = f"import sys; from botlease.work import ahead; print(ahead.command({words!r}, {{}}), sys.stdin.read())"
        argv = (PYTHON, "-c", code)
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as looks:
            assert looks.communicate("bot", timeout=10)[0] == "None bot\n"


def test_a_bot_that_crashes_is_started_again_by_exec(sqlite_world: World) -> None:
    """There is no interpreter ahead beside a bot."""
    script = sqlite_world.folder / "mybot.py"
    script.write_text(
        "import os, signal, sys\n"
        "print('with', open('/proc/self/cmdline').read().split(chr(0))[1:2], os.environ['BOTLEASE_TERM'], flush=True)\n"
        "if not os.path.exists('once'): open('once', 'x'); sys.exit(3)\n"
        "signal.pause()\n"
    )
    first = sqlite_world.run("--deployment", "v1", bot=(PYTHON, str(script)), wrap=("env", f"--chdir={script.parent}"))
    until(lambda: first.text().count(f"with ['{script}'] 1") == 2)
    assert "restart 1 of 5" in first.text()


def test_where_its_reaper_was_killed_there_is_a_new_one_with_a_new_interpreter(sqlite_world: World) -> None:
    sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    second = sqlite_world.run("--deployment", "v1", "--standby")
    waiting = ["botlease-reaper", "botlease-spare"]
    until(lambda: [comm(p) for p in second.children()] == waiting)
    reaper, spare = second.children()
    os.kill(reaper, signal.SIGKILL)
    until(lambda: gone(reaper) and gone(spare) and [comm(p) for p in second.children()] == waiting)


def test_an_interpreter_that_dies_while_it_waits_is_started_as_ever(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text(
        "import os, sys\nif 'launch' in str(sys.orig_argv):\n    open('died', 'x')\n    os._exit(3)\n"
    )
    with closing(Reaper()) as r:
        r.prepare((PYTHON, "bot.py"), early=True, PYTHONPATH=str(folder), RESULT=str(folder / "result.json"))
        until(lambda: (folder / "died").exists() and not r.children())
        r.start({})
        r.says("started")
        assert r.says("gone")["status"] == 0
    assert json.loads((folder / "result.json").read_text())["argv"] == ["bot.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interpreter_that_is_killed_while_it_waits_says_nothing_and_is_replaced(folder: Path, number: int) -> None:
    (folder / "bot.py").write_text("print('here')")
    with errors_to(folder / "said"):
        r = Reaper()
    with closing(r), (folder / "said").open("ab") as said:
        os.kill(r.prepare_ahead((PYTHON, "bot.py")), number)
        until(lambda: not r.children())
        r.start({"stdout": said.fileno()})
        assert r.says("gone")["status"] == 0
    assert (folder / "said").read_text() == "here\n"


def test_it_ends_without_a_word_when_no_bot_is_wanted_any_more_or_its_reaper_is_gone(folder: Path) -> None:
    for number in (0, signal.SIGKILL):
        with errors_to(folder / "said"):
            r = Reaper()
        waiting = r.prepare_ahead((PYTHON, "bot.py"))
        if number:
            os.kill(r.pid, number)
        r.close()
        until(lambda pid=waiting: gone(pid))
    assert (folder / "said").read_text() == ""


def test_the_end_of_the_line_says_that_no_bot_is_wanted(folder: Path) -> None:
    ours, its = socket.socketpair()
    argv = (PYTHON, ahead.LAUNCH, "python", str(its.fileno()), "bot.py")
    with subprocess.Popen(argv, pass_fds=[its.fileno()], stderr=subprocess.PIPE) as waiting:
        its.close()
        until(lambda: comm(waiting.pid) == "botlease-spare")
        ours.close()
        assert (waiting.communicate()[1], waiting.returncode) == (b"", 0)


def test_who_stands_by_has_loaded_the_interpreter_and_nothing_of_the_bot(sqlite_world: World) -> None:
    name = f"ahead{os.getpid()}"
    touched = sqlite_world.folder / "touched"
    script = sqlite_world.folder / "mybot.py"
    script.write_text(f"open({str(touched)!r}, 'a').write('x')\nimport signal\nsignal.pause()\n")
    first = sqlite_world.run("--name", name, "--deployment", "v1", bot=(PYTHON, str(script)))
    until(lambda: touched.exists() and touched.read_text() == "x")
    second = sqlite_world.run("--name", name, "--deployment", "v1", "--standby", bot=(PYTHON, str(script)))
    second.says("standby")
    until(lambda: [comm(p) for p in second.children()] == ["botlease-reaper", "botlease-spare"])
    waiting = second.children()[1]
    assert touched.read_text() == "x"
    found = {f.pid: f.what for f in local.find(name)}
    assert found == {first.pid: "supervisor", second.pid: "supervisor", first.children()[1]: "bot"}
    first.signal(signal.SIGTERM)
    first.wait()
    until(lambda: touched.read_text() == "xx")
    assert second.children()[1] == waiting
    assert {f.pid: f.what for f in local.find(name)} == {second.pid: "supervisor", waiting: "bot"}


@pytest.mark.parametrize("how", ["option", "variable", "warm"])
def test_it_is_not_started_ahead_where_it_is_not_to_be(sqlite_world: World, how: str) -> None:
    sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    option = {"option": ("--no-ahead",), "warm": ("--warm",)}.get(how, ())
    env = {"BOTLEASE_NO_AHEAD": "1"} if how == "variable" else {}
    bot = sqlite_world.bot(gate="fd") if how == "warm" else ()
    second = sqlite_world.run("--deployment", "v1", "--standby", *option, env=env, bot=bot)
    second.says("ready:" if how == "warm" else "standby")
    names = until(lambda: [comm(p) for p in second.children()][1:])
    assert "restart" not in second.text()
    assert names == [Path(PYTHON).name if how == "warm" else "botlease-reaper"]


def test_what_it_prints_is_seen_at_once_where_it_is_the_proof_of_progress(sqlite_world: World) -> None:
    """Into a pipe Python writes in blocks, if it is not told otherwise when it starts."""
    script = sqlite_world.folder / "mybot.py"
    script.write_text("import signal\nprint('got updates')\nsignal.pause()\n")

    def run() -> Run:
        options = ("--healthy-if", "stdout:got updates", "--deployment", "v1", "--standby")
        return sqlite_world.run(*options, env={"PYTHONUNBUFFERED": ""}, bot=(PYTHON, str(script)))

    first = run()
    first.says("got updates")
    second = run()
    until(lambda: "botlease-spare" in [comm(p) for p in second.children()])
    first.signal(signal.SIGTERM)
    second.says("got updates")
