"""From the command line to a supervisor: who reads it, and what is loaded for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import clean_env, until
from reapers import comm, gone

BEFORE = """
import os, sys
import botlease.start
def start(command, **options):
    print(command, options["name"], options["warm"], options["ttl"])
    print(*(m for m in ("click", "botlease.cli", "asyncio", "_ssl", "botlease.run") if m in sys.modules))
    return 7
botlease.start.start = start
"""
MAIN = """
from botlease.__main__ import main
main()
"""


def run(code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", BEFORE + code + MAIN, "run", *words]
    return subprocess.run(argv, capture_output=True, text=True, env=clean_env(**env))


def test_a_supervisor_has_not_loaded_what_reads_its_command_line() -> None:
    done = run("", "--name", "n", "--warm", "--ttl", "5", "--", "python", "-m", "bot", "--name", "its")
    assert (done.returncode, done.stderr) == (7, "")
    said, loaded = done.stdout.splitlines()
    assert said == "('python', '-m', 'bot', '--name', 'its') n True 5.0"
    assert loaded.split() == ["asyncio", "botlease.run"]  # on SQLite: no ssl


def test_where_nothing_more_can_be_forked_it_reads_its_command_line_itself() -> None:
    """The reaper is there already: the second fork fails."""
    code = "fork = os.fork\ndef once():\n    def never(): raise BlockingIOError(11, 'no more')\n"
    code += "    os.fork = never\n    return fork()\nos.fork = once\n"
    done = run(code, "--name", "n", "--", "bot")
    assert (done.returncode, done.stderr) == (7, "")
    said, loaded = done.stdout.splitlines()
    assert said == "('bot',) n False None" and "botlease.cli" in loaded


@pytest.mark.parametrize(
    ("words", "env", "loaded"),
    [
        ((), {"DATABASE_URL": "postgresql://h/d"}, ["asyncio", "_ssl", "botlease.run"]),
        ((), {"DATABASE_URL": "sqlite:///x.db"}, ["asyncio", "botlease.run"]),
        ((), {"DATABASE_URL": "mysql://h/d"}, ["asyncio", "_ssl", "botlease.run"]),  # start says what is wrong
        (("--database", "sqlite:///x.db"), {"DATABASE_URL": "postgresql://h/d"}, []),
        (("--database=sqlite:///x.db",), {"DATABASE_URL": "postgresql://h/d"}, []),
    ],
)
def test_what_is_loaded_meanwhile_is_for_the_database_that_it_will_have(
    words: tuple[str, ...], env: dict[str, str], loaded: list[str]
) -> None:
    done = run("", "--name", "n", *words, "--", "bot", **env)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines()[1].split() == loaded


def test_what_has_no_options_for_a_supervisor_ends_as_its_reader_did() -> None:
    for words, code, said in (
        (("--help",), 0, "Usage: botlease run"),
        ((), 2, "no command"),
        (("--ttl", "x", "--", "bot"), 2, "'x' is not a valid float"),
    ):
        done = run("", *words)
        assert done.returncode == code and said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    broken = "import botlease.cli\nbotlease.cli.main = None\n"
    done = run(broken, "--", "bot")
    assert done.returncode == 70 and "AttributeError" in done.stderr and done.stdout == ""
    killed = "import signal, botlease.cli\nclass Killed:\n"
    killed += "    def main(self, **_): os.kill(os.getpid(), signal.SIGKILL)\nbotlease.cli.main = Killed()\n"
    assert run(killed, "--", "bot").returncode == 128 + signal.SIGKILL


def test_who_reads_the_command_line_dies_with_its_supervisor_and_so_the_reaper_does(tmp_path: Path) -> None:
    there = tmp_path / "reader"
    code = "import signal, botlease.cli\nclass Hangs:\n    def main(self, **_):\n"
    code += f"        open({str(there)!r}, 'w').write(str(os.getpid()))\n        signal.pause()\n"
    code += "botlease.cli.main = Hangs()\n"
    argv = [sys.executable, "-c", BEFORE + code + MAIN, "run", "--", "bot"]
    with subprocess.Popen(argv, env=clean_env()) as supervisor:
        reader = int(str(until(lambda: there.exists() and there.read_text())))
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        (reaper,) = (int(pid) for pid in children if int(pid) != reader)
        until(lambda: comm(reaper) == "botlease-reaper")
        supervisor.kill()
        until(lambda: gone(reader) and gone(reaper))


def test_that_dead_children_are_ignored_where_it_is_started_changes_nothing() -> None:
    """As some process managers have it, and ``trap '' CHLD``: the kernel buries them, and nobody can wait for them."""
    argv = [sys.executable, "-c", BEFORE + MAIN, "run", "--name", "n", "--", "bot"]
    code = f"import os, signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv({argv[0]!r}, {argv!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env())
    assert (done.returncode, done.stderr) == (7, "")


def test_ctrl_c_while_it_starts_ends_it_without_a_word() -> None:
    code = "def load_early(*_): raise KeyboardInterrupt\nbotlease.start.load_early = load_early\n"
    done = run(code, "--name", "n", "--", "bot")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_driver_that_is_there_and_broken_is_named_with_the_cure() -> None:
    code = "import sys\nsys.modules['asyncpg.pgproto.pgproto'] = None\n"
    argv = [sys.executable, "-c", code + MAIN, "run", "--name", "n", "--", "true"]
    done = subprocess.run(argv, capture_output=True, text=True, env=clean_env(DATABASE_URL="postgresql://h/d"))
    assert done.returncode == 78 and "pip install 'asyncpg>=0.30'" in done.stderr and "Traceback" not in done.stderr


def test_the_reaper_is_forked_before_what_it_has_no_use_for_is_loaded() -> None:
    code = "import sys, botlease.stderr, botlease.work.reaper\n"
    code += "print(*{'socket', 'signal', 'enum', 'typing', 're', 'asyncio', 'dataclasses'}.intersection(sys.modules))"
    env = clean_env(PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "\n"


def test_a_sigterm_while_it_starts_ends_it_as_a_stop_does() -> None:
    """As PID 1 the kernel drops a signal that has no handler: it went on, took over, and was killed with the lease."""
    code = "import signal\ndef load_early(*_):\n    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()\n"
    code += "botlease.start.load_early = load_early\n"
    done = run(code, "--name", "n", "--", "bot")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
