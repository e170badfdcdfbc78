"""Bad input: one line that says what is wrong and what to do, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context
from harness import BOTLEASE, World, clean_env, marked

from botlease.cli import main

CASES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "no command": ([], {}, 2, "no command: botlease run"),
    "an unknown option": (["--tll", "5", "--", "true"], {}, 2, "No such option"),
    "a missing command": (["--", "no-such-program"], {}, 127, "cannot find the command no-such-program"),
    "a command that cannot be executed": (["--", "./plain.txt"], {}, 126, "permission denied"),
    "a ttl that is no number": (["--ttl", "soon", "--", "true"], {}, 2, "not a valid float"),
    "a ttl that is too short": (["--ttl", "0.5", "--", "true"], {}, 78, "at least 1 s"),
    "a negative lock-delay": (["--lock-delay=-1", "--", "true"], {}, 78, "between 0 and 86400"),
    "a bot name with odd characters": (["--name", "a b;'\x1b[31m", "--", "true"], {}, 78, "letters, digits"),
    "an empty name": (["--name", "", "--", "true"], {}, 78, "letters, digits"),
    "options that exclude each other": (["--take-over", "--standby", "--", "true"], {}, 78, "exclude each other"),
    "an unknown profile": (["--profile", "slow", "--", "true"], {}, 78, "use default or fast"),
    "a misspelt variable": (["--", "true"], {"BOTLEASE_TLL": "5"}, 78, "BOTLEASE_TLL is not known"),
    "a variable that is no number": (["--", "true"], {"BOTLEASE_TTL": "5s"}, 78, "'5s', which is not a number"),
    "half a crash": (["--", "true"], {"BOTLEASE_MAX_CRASHES": "1.5"}, 78, "whole number"),
    "a grace that is no number": (["--", "true"], {"BOTLEASE_PLATFORM_GRACE": "60s"}, 78, "which is not a number"),
    "a rule that no bot can keep": (["--healthy-if", "127.0.0.1:80/", "--", "true"], {}, 78, "begins with http://"),
    "a port that cannot be": (["--", "true"], {"BOTLEASE_HEALTH_PORT": "70000"}, 78, "between 0 and 65535"),
    "a wrong URL": (["--", "true"], {"BOTLEASE_DATABASE_URL": "mysql://u:secret@h/d"}, 78, "use postgresql://"),
    "no URL at all": (["--", "true"], {"BOTLEASE_DATABASE_URL": "nonsense"}, 78, "use postgresql://"),
    "SQLite in memory": (["--", "true"], {"BOTLEASE_DATABASE_URL": "sqlite:///:memory:"}, 78, "name a file"),
    "a URL with a bad port": (["--", "true"], {"BOTLEASE_DATABASE_URL": "postgresql://h:port/d"}, 78, "not valid"),
    "an unreachable database": (
        ["--", "true"],
        {"BOTLEASE_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/d"},
        69,
        "cannot reach PostgreSQL at 127.0.0.1:1",
    ),
    "a host that does not exist": (
        ["--", "true"],
        {"BOTLEASE_DATABASE_URL": "postgresql://u:secret@no-such-host.invalid/d"},
        69,
        "cannot reach PostgreSQL at no-such-host.invalid",
    ),
    "a folder that cannot be made": (
        ["--", "true"],
        {"BOTLEASE_DATABASE_URL": "sqlite:////proc/x/y.db"},
        78,
        "cannot write",
    ),
}


def run(args: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    mark = f"bad-{os.getpid()}-{cwd.name}"
    result = subprocess.run(
        [*BOTLEASE, *args],
        env=clean_env(**({"BOTLEASE_DATABASE_URL": f"sqlite:///{cwd}/x.db"} | env), MARK=mark),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert marked(mark.encode()) == []
    return result


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_its_exit_code(tmp_path: Path, case: str) -> None:
    args, env, code, says = CASES[case]
    (tmp_path / "plain.txt").write_text("x")
    result = run(["run", *args], tmp_path, **env)

    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr and "secret" not in result.stderr and "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "x.db").exists()


def test_a_foreign_table_of_the_same_name_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute("CREATE TABLE bot_instances (id INTEGER)")
    db.close()
    result = run(["run", "--", "true"], tmp_path)
    assert result.returncode == 78 and "belongs to something else" in result.stderr
    with sqlite3.connect(tmp_path / "x.db") as db:
        assert [r[0] for r in db.execute("SELECT name FROM sqlite_master")] == ["bot_instances"]
    db.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch(mode=0o400)
    result = run(["run", "--", "true"], tmp_path)
    assert result.returncode == 78 and "cannot write" in result.stderr


def test_a_database_in_read_only_mode_is_named(postgres_url: str, tmp_path: Path) -> None:
    url = postgres_url + "?options=-cdefault_transaction_read_only%3Don"
    result = run(["run", "--", "true"], tmp_path, BOTLEASE_DATABASE_URL=url)
    assert result.returncode == 69 and "is read-only: connect to the primary" in result.stderr


def test_a_wrong_password_and_a_missing_database_are_named(postgres_url: str, tmp_path: Path) -> None:
    result = run(["run", "--", "true"], tmp_path, BOTLEASE_DATABASE_URL=postgres_url + "_gone")
    assert result.returncode == 78 and "has no such database" in result.stderr


def test_several_hosts_in_a_url_are_no_bad_input(tmp_path: Path) -> None:
    """That none of them is there now may be over soon, and is not for a platform to give up for."""
    for hosts in ("127.0.0.1:1,127.0.0.1:2", "[::1]:1,127.0.0.1:2"):
        result = run(["run", "--", "true"], tmp_path, BOTLEASE_DATABASE_URL=f"postgresql://bot@{hosts}/bots")
        assert result.returncode == 69 and f"cannot reach PostgreSQL at {hosts}/bots" in result.stderr
    result = run(["run", "--", "true"], tmp_path, BOTLEASE_DATABASE_URL="postgresql://bot@h1:1,h2:x/bots")
    assert result.returncode == 78 and "is not valid" in result.stderr


def test_a_missing_driver_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    block = "import sys; sys.modules['asyncpg'] = None; import importlib.util as u; f = u.find_spec\n"
    block += "u.find_spec = lambda n, *a: None if n == 'asyncpg' else f(n, *a)\n"
    block += "from botlease.cli import main; main(['run', '--', 'true'])"
    result = subprocess.run(
        [sys.executable, "-c", block],
        env=clean_env(BOTLEASE_DATABASE_URL="postgresql://h/d"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 78 and "pip install 'asyncpg>=0.30'" in result.stderr


def test_promoting_nobody_is_an_error(tmp_path: Path) -> None:
    result = run(["promote", "nobody"], tmp_path)
    assert result.returncode == 78 and "there is no database at" in result.stderr
    assert not (tmp_path / "x.db").exists()
    assert run(["run", "--", "true"], tmp_path).returncode == 0
    result = run(["promote", "nobody"], tmp_path)
    assert result.returncode == 78 and "no instance 'nobody'" in result.stderr


def test_a_port_in_use_is_named(sqlite_world: World, tmp_path: Path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        result = run(["run", "--health-port", str(s.getsockname()[1]), "--", "true"], tmp_path)
    assert result.returncode == 78 and "cannot listen on port" in result.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in main.list_commands(Context(main)))])
def test_every_command_has_help(command: list[str], tmp_path: Path) -> None:
    result = run([*command, "--help"], tmp_path)
    assert result.returncode == 0 and "Usage:" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("edit", "says", "verbs"),
    [
        ("UPDATE bot_leases SET term = 'many'", "term is 'many', where a number must be", ("verify", "status", "run")),
        ("UPDATE bot_leases SET ttl = 'long'", "ttl is 'long', where a number must be", ("status", "run")),
        ("UPDATE bot_terms SET term = 'x'", "term is 'x', where a number must be", ("verify", "history")),
    ],
)
def test_a_word_where_a_number_must_be_is_named(
    sqlite_world: World, tmp_path: Path, edit: str, says: str, verbs: tuple[str, ...]
) -> None:
    world = {"BOTLEASE_DATABASE_URL": sqlite_world.url}
    assert run(["run", "--", "true"], tmp_path, **world).returncode == 0
    sqlite_world.sql(edit)
    for verb in verbs:
        if verb == "run":
            started = sqlite_world.run()
            started.says(says)
            assert "Traceback" not in started.text()
            continue
        done = run([verb], tmp_path, **world)
        assert says in done.stderr and "Traceback" not in done.stderr and done.returncode in (69, 78), (verb, done)


def test_a_damaged_database_is_named_and_left_alone(sqlite_world: World, tmp_path: Path) -> None:
    world = {"BOTLEASE_DATABASE_URL": sqlite_world.url}
    assert run(["run", "--", "true"], tmp_path, **world).returncode == 0
    file = Path(sqlite_world.url.removeprefix("sqlite:///"))
    db = sqlite3.connect(file)
    (size,) = db.execute("PRAGMA page_size").fetchone()
    (root,) = db.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_bot_instances_1'"
    ).fetchone()
    db.close()
    with file.open("r+b") as f:  # the index has lost its rows: each of them could be inserted a second time
        f.seek((root - 1) * size + 3)
        f.write(b"\0\0")
    before = file.read_bytes()
    for verb in (["run", "--", "true"], ["status"]):
        done = run(verb, tmp_path, **world)
        assert done.returncode == 78 and "is damaged" in done.stderr and "Traceback" not in done.stderr, done
    assert file.read_bytes() == before


def test_what_kubernetes_says_of_a_service_with_our_name_is_no_setting_of_ours(tmp_path: Path) -> None:
    """It tells each pod of a namespace: all of them ended with 78."""
    service = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80", "PORT": "tcp://10.0.0.1:80"}
    service |= {"PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_ADDR": "10.0.0.1", "API_SERVICE_HOST": "10.0.0.2"}
    env = {f"BOTLEASE_{name}": value for name, value in service.items()}
    assert run(["run", "--", "true"], tmp_path, **env).returncode == 0
    for wrong in ("BOTLEASE_PORTS", "BOTLEASE_TTL_"):
        assert run(["run", "--", "true"], tmp_path, **{wrong: "1"}).returncode == 78
