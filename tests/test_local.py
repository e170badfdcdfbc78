"""The local check: what is an instance is found, what only looks like one is never touched."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from harness import BOTLEASE, World, clean_env, until

from botlease import local, presence, procfs
from botlease.work.tree import descendants

ROOT = Path(__file__).resolve().parent.parent
# a bot of its own: tests that run beside this one start real scripts of other bots
BOT = str(7_000_000_000 + os.getpid())
TOKEN = f"{BOT}:AA-the-token-of-the-local-check"
ROUNDS = 20


def check(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "check_bot_running.py"), *options], env=clean_env(), capture_output=True, text=True
    )


def test_the_local_check_lists_refuses_and_force_kills(sqlite_world: World) -> None:
    name = f"check{os.getpid()}"
    assert check("--name", name).returncode == 0
    run = sqlite_world.run("--name", name, ttl="10")
    sqlite_world.works(1)
    found = check("--name", name)
    assert found.returncode == 1
    assert f"supervisor pid {run.pid}, started 20" in found.stdout and "refused" in found.stderr
    rows = json.loads(check("--name", name, "--json").stdout)
    assert [r["what"] for r in rows] == ["supervisor", "bot"]

    killed = check("--name", name, "--force-kill")
    assert killed.returncode == 0, killed.stderr
    assert run.wait() == 0  # SIGTERM was enough: it drained and released
    assert check("--name", name).returncode == 0


def test_the_local_check_kills_what_ignores_sigterm(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from botlease import local

    name = f"deaf{os.getpid()}"
    run = sqlite_world.run("--name", name, "--stop-grace", "60")
    sqlite_world.works(1)
    for pid in run.children():
        os.kill(pid, signal.SIGSTOP)
    assert local.force_kill(local.find(name), grace=0.3, say=lambda text: None)
    run.process.wait(5)
    assert local.find(name) == []


def test_a_bot_that_is_given_time_to_stop_gets_it_from_the_local_check(sqlite_world: World) -> None:
    name = f"slow{os.getpid()}"
    stopping = sqlite_world.bot(slow=13)  # what --force-kill gives one that does not say how long it takes: 12 s
    run = sqlite_world.run("--name", name, "--stop-grace", "20", bot=stopping, ttl="10")
    sqlite_world.works(1)
    assert check("--name", name, "--force-kill").returncode == 0
    assert run.wait() == 0  # it has released: it was not killed


@pytest.mark.parametrize(
    ("argv", "is_bot"),
    [
        (["python", "railway_startup.py"], True),
        (["/usr/bin/python3.11", "-u", "/app/railway_startup.py"], True),
        (["python3", "-m", "trading_bot"], True),
        (["python3", "-X", "dev", "-m", "trading_bot.__main__"], True),
        (["python3", "-W", "error", "instance_manager.py", "--ttl", "5"], True),
        (["vim", "railway_startup.py"], False),
        (["less", "trading_bot/bot.py"], False),
        (["grep", "-r", "trading_bot", "."], False),
        (["tail", "-f", "trading_bot.log"], False),
        (["python3", "-m", "pytest", "trading_bot"], False),
        (["python3", "-c", "import trading_bot"], False),
        (["python3", "check_bot_running.py"], False),
        (["python3", "-m", "trading_bot_tests"], False),
        (["python3", "my_railway_startup.py"], False),
        (["python3", "tool.py", "railway_startup.py"], False),
        (["bash", "-c", "python railway_startup.py"], False),
        (["ssh", "host", "python", "railway_startup.py"], False),
        (["code", "--wait", "railway_startup.py"], False),
        (["watch", "python", "railway_startup.py"], False),
        (["python3"], False),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else str(v),
)
def test_a_command_line_is_parsed_and_not_searched(argv: list[str], is_bot: bool) -> None:
    from botlease.local import runs

    assert runs(argv) is is_bot


# Decoys ------------------------------------------------------------------------------------------------------------

SLEEP = "import time\ntime.sleep(600)\n"
TOOLS = (
    "pytest",
    "IPython",
    "mypy",
    "ruff",
    "pylsp",
    "debugpy",
    "jupyter",
    "coverage",
    "tox",
    "black",
    "pip",
    "pylint",
)


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SLEEP)
    return path


def decoys(folder: Path) -> Iterator[tuple[list[str], dict[str, object]]]:
    """(command line, how it is started) of processes that mention the bot, or have its token, and are not it."""
    sleeper = str(program(folder / "sleep" / "x"))  # what an interpreter under another name really runs
    source = str(folder / "trading_bot" / "bot.py")
    Path(source).parent.mkdir()
    Path(source).write_text("# the bot\n")
    startup = str(folder / "railway_startup.py")
    Path(startup).write_text("# the script\n")
    token = {"env": clean_env(TELEGRAM_BOT_TOKEN=TOKEN)}
    # Editors, pagers, IDEs and the like, by their names, with the bot's source on their command line.
    for name in (
        *("vim", "vi", "nvim", "nano", "emacs", "micro", "helix", "code", "code-insiders", "subl", "gedit", "kate"),
        *("less", "more", "most", "bat", "man", "pycharm", "idea", "zed", "cursor", "ranger", "mc", "tmux", "screen"),
        *("gdb", "strace", "rsync", "scp", "git", "entr", "watch", "nohup", "ssh", "docker", "kubectl", "make"),
    ):
        yield [name, sleeper, source, startup], {"executable": sys.executable, **token}
    # Real tools of this machine.
    yield ["tail", "-f", source], token
    yield ["tail", "-F", startup, source], {}
    yield ["grep", "-r", "railway_startup.py", "-"], {"stdin": subprocess.PIPE, **token}
    yield ["cat", "-", source], {"stdin": subprocess.PIPE}
    yield ["sh", "-c", "sleep 600; : python railway_startup.py"], token
    yield ["sh", "-c", "sleep 600; : python -m trading_bot"], {}
    yield ["sleep", "600"], token
    yield ["env", "X=python trading_bot.py", "sleep", "600"], token
    # Python that is not the bot.
    yield [sys.executable, "-c", SLEEP, "railway_startup.py"], token
    yield [sys.executable, "-uc", SLEEP, "-m", "trading_bot"], token
    yield [sys.executable, "-"], {"stdin": subprocess.PIPE, **token}
    yield [sys.executable, "-i"], {"stdin": subprocess.PIPE, **token}
    yield [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)], token
    for tool in TOOLS:
        program(folder / "tools" / f"{tool}.py")
        path = {"env": clean_env(TELEGRAM_BOT_TOKEN=TOKEN, PYTHONPATH=str(folder / "tools"))}
        yield [sys.executable, "-m", tool, source, "railway_startup.py"], path
    program(folder / "pkg" / "trading_bot" / "export.py")  # a tool of the bot, not the bot
    yield [sys.executable, "-m", "trading_bot.export"], {"env": clean_env(PYTHONPATH=str(folder / "pkg"))}
    yield (
        [sys.executable, "-m", "trading_bot_tests"],
        {"env": clean_env(PYTHONPATH=str(program(folder / "tools" / "trading_bot_tests.py").parent))},
    )
    for script in (
        folder / "my_railway_startup.py",
        folder / "trading_bot" / "report.py",
        folder / "old" / "trading_bot.py.bak",
    ):
        yield [sys.executable, str(program(script))], {}  # without the token: somebody's own affair
    for script in (
        folder / "tests" / "run_all.py",
        folder / "test_trading_bot.py",
        folder / "lib" / "site-packages" / "tool.py",
        folder / ".vscode" / "extensions" / "server.py",
        folder / "venv" / "bin" / "botlease",
        folder / "conftest.py",
        folder / "check_bot_running.py",
    ):
        yield [sys.executable, str(program(script)), "railway_startup.py"], token
    # The same token, spelt almost the same; another bot's; a variable of another name.
    other = str(program(folder / "another_bot.py"))
    for env in ({"BOT_TOKEN": TOKEN + "x"}, {"BOT_TOKEN": "777:AA-of-another-bot-altogether"}, {"NOTE": TOKEN}):
        yield [sys.executable, other], {"env": clean_env(**env)}
    if node := shutil.which("node"):
        code = "setTimeout(() => {}, 600000)"
        for script in (folder / "node_modules" / "x" / "server.js", folder / ".vscode-server" / "out" / "main.js"):
            program(script).write_text(code)
            yield [node, str(script)], token
        yield [node, "-e", code, "bot.js"], token
    if os.geteuid() == 0:  # the bot itself, but somebody else's
        public = Path("/tmp") / f"decoy-{os.getpid()}"
        public.mkdir(mode=0o755)
        (public / "railway_startup.py").write_text("sleep 600\n")
        yield ["python3", str(public / "railway_startup.py")], {"executable": "/bin/sh", "user": "nobody"}


@pytest.fixture
def herd(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for argv, how in decoys(tmp_path):
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": clean_env(), **how}
            options["cwd"] = tmp_path  # not here, where the real trading_bot is
            options["start_new_session"] = True  # to be ended with what they have started
            started.append(subprocess.Popen(argv, **options))  # type: ignore[call-overload]
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin,):
                if stream is not None:
                    stream.close()
        shutil.rmtree(Path("/tmp") / f"decoy-{os.getpid()}", ignore_errors=True)


def test_of_sixty_decoys_none_is_ever_touched_and_the_bot_is_ended_each_time(
    herd: list[subprocess.Popen[bytes]], tmp_path: Path, runtime_folder: Path
) -> None:
    assert len(herd) >= 60
    targets = {
        "script": [sys.executable, str(program(tmp_path / "real" / "railway_startup.py"))],
        "same token": [sys.executable, str(program(tmp_path / "real" / "my_own_bot.py"))],
        "module": [sys.executable, "-m", "trading_bot"],
    }
    program(tmp_path / "real" / "trading_bot" / "__main__.py")
    # A note whose pid belongs to a decoy by now: it fits nobody.
    folder = runtime_folder / "botlease"
    folder.mkdir(mode=0o700, exist_ok=True)
    reused = presence.Note(procfs.host(), herd[0].pid, "1", BOT, "gone")
    before = {p.pid for p in herd}
    for n in range(ROUNDS):
        (folder / "gone.json").write_text(json.dumps({k: getattr(reused, k) for k in presence.Note.__slots__}))
        kind = sorted(targets)[n % len(targets)]
        env = clean_env(TELEGRAM_BOT_TOKEN=TOKEN, PYTHONPATH=str(tmp_path / "real"))
        with subprocess.Popen(targets[kind], env=env, cwd=tmp_path / "real") as target:
            until(
                lambda t=target: procfs.start_time(t.pid) and b"python" in Path(f"/proc/{t.pid}/cmdline").read_bytes()
            )
            # It is started by an ancestor whose own command line is the bot's.
            wrapper = tmp_path / "wrapper" / "railway_startup.py"
            wrapper.parent.mkdir(exist_ok=True)
            call = [sys.executable, str(ROOT / "check_bot_running.py"), "--force-kill"]
            wrapper.write_text(f"import subprocess, sys\nsys.exit(subprocess.call({call!r}))\n")
            done = subprocess.run([sys.executable, str(wrapper)], env=env, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert target.wait(5) == -signal.SIGTERM
        assert f" {target.pid}, started " in done.stdout and done.stdout.count("\n") == 1, done.stdout
        assert TOKEN not in done.stdout + done.stderr
        dead = [p.args for p in herd if p.poll() is not None]
        assert dead == [], f"round {n}: {dead}"
    assert {p.pid for p in herd} == before and not (folder / "gone.json").exists()


# Notes -------------------------------------------------------------------------------------------------------------


def test_a_standby_is_found_by_its_note_and_leaves_none_behind(sqlite_world: World, runtime_folder: Path) -> None:
    name = f"note{os.getpid()}"
    first = sqlite_world.run("--name", name, "--deployment", "v1")
    sqlite_world.works(1)
    second = sqlite_world.run("--name", name, "--deployment", "v1")
    second.says("standby: ")
    found = json.loads(check("--name", name, "--json").stdout)
    assert {(f["pid"], f["what"]) for f in found if f["what"] == "supervisor"} == {
        (first.pid, "supervisor"),
        (second.pid, "supervisor"),
    }
    for run in (second, first):
        run.signal(signal.SIGTERM)
        run.wait()
    assert [p for p in (runtime_folder / "botlease").glob("*.json") if name in p.name] == []


def test_an_instance_inside_a_program_is_found_too(tmp_path: Path, sqlite_url: str) -> None:
    name = f"inside{os.getpid()}"
    code = (
        "import asyncio, botlease\n"
        "async def main():\n"
        f"    async with botlease.active({name!r}):\n"
        "        print('in', flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    env = clean_env(BOTLEASE_DATABASE_URL=sqlite_url)
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        (found,) = json.loads(check("--name", name, "--json").stdout)
        assert (found["pid"], found["what"]) == (process.pid, "program")
        process.terminate()
        process.stdout.read()
        process.wait(10)
    assert check("--name", name).returncode == 0


def test_a_second_local_start_is_refused_with_the_first_ones_pid_start_time_and_the_command_that_ends_it(
    sqlite_world: World,
) -> None:
    first = sqlite_world.run("--name", "b")
    sqlite_world.works(1)
    second = sqlite_world.run("--name", "b")
    assert second.wait() == 75
    text = second.text()
    assert f"pid {first.pid} " in text and f"`kill {first.pid}`" in text
    assert time.strftime("started %Y-%m-%d", time.gmtime()) in text


def test_notes_are_private_and_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with presence.announced("b", "b-1", 10.0, env) as path:
        assert path is not None and path.parent == tmp_path / "botlease"
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
        assert [n.instance_id for n in presence.notes(env)] == ["b-1"]
    assert presence.notes(env) == []
    (tmp_path / "botlease").chmod(0o777)  # anybody could write notes about anybody here
    with presence.announced("b", "b-2", 10.0, env) as path:
        assert path is not None and path.parent == tmp_path / "state" / "botlease" / "run"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"pid": "1"}', "\0"),
        '{"host": 1, "pid": 1, "start": "", "bot": "", "instance_id": ""}',
        json.dumps(
            asdict(presence.Note(procfs.host(), os.getpid(), str(procfs.start_time(os.getpid())), "b", "i", math.nan))
        ),
    ],
)
def test_a_note_that_cannot_be_read_is_passed_over(tmp_path: Path, text: str) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    (tmp_path / "botlease").mkdir(mode=0o700)
    (tmp_path / "botlease" / "x.json").write_text(text)
    assert presence.notes(env) == []


def test_without_a_place_for_notes_an_instance_runs_all_the_same() -> None:
    with presence.announced("b", "b-1", 10.0, {"XDG_RUNTIME_DIR": "/proc"}) as path:
        assert path is None


def test_a_note_of_another_container_with_the_same_home_is_left_alone(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    (tmp_path / "botlease").mkdir(mode=0o700)
    for name, host in (("other", "another-boot/pid:[1]"), ("ours", procfs.host())):
        note = {"host": host, "pid": 1, "start": "1", "bot": "b", "instance_id": name}
        (tmp_path / "botlease" / f"{name}.json").write_text(json.dumps(note))
    assert presence.notes(env) == []
    assert [p.stem for p in (tmp_path / "botlease").iterdir()] == ["other"]


def test_the_check_names_the_command_that_ends_what_it_found(sqlite_world: World) -> None:
    name = f"named{os.getpid()}"
    sqlite_world.run("--name", name)
    sqlite_world.works(1)
    assert "`check_bot_running.py --force-kill`" in check("--name", name).stderr
    done = subprocess.run([*BOTLEASE, "check", "--name", name], env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 1 and "`botlease check --force-kill`" in done.stderr
    assert local.find("no-such-bot") == []


def test_the_bot_of_a_container_seen_from_the_host_is_not_ours_to_end(tmp_path: Path) -> None:
    script = tmp_path / "trading_bot.py"
    script.write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    container = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespace can be made here")
    for wrap, seen in ((container, False), ((), True)):
        (tmp_path / "begun").unlink(missing_ok=True)
        process = subprocess.Popen([*wrap, sys.executable, str(script)], cwd=tmp_path)
        try:
            until((tmp_path / "begun").exists)
            theirs = {process.pid, *descendants(process.pid)}
            assert bool({f.pid for f in local.find(None)} & theirs) is seen
        finally:
            process.kill()
            process.wait()


def test_the_zombie_of_a_bot_is_not_the_bot(tmp_path: Path) -> None:
    name = f"zombie{os.getpid()}"
    (tmp_path / "trading_bot.py").write_text("")
    env = clean_env(BOTLEASE_NAME=name)
    dead = subprocess.Popen([sys.executable, "trading_bot.py"], cwd=tmp_path, env=env)
    until(lambda: (procfs.stat(dead.pid) or [b""])[0] == b"Z")
    assert local.find(name) == []
    dead.wait()


FIND = """
import subprocess, sys
from botlease import local, settings
bot = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
bot.stdout.readline()
try:
    print("found it" if [f.pid for f in local.find(sys.argv[2])] == [bot.pid] else "found something else")
except settings.ConfigurationError as e:
    print(e)
bot.kill()
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, who mounts")
@pytest.mark.parametrize(
    ("mount", "says"),
    [
        ("-t proc -o hidepid=2 proc /proc", "found it\n"),
        ("-t tmpfs none /proc", "the local check reads /proc, which is not there: it works on Linux alone\n"),
    ],
    ids=["processes of others are hidden", "there is no /proc"],
)
def test_the_local_check_finds_its_own_where_others_are_hidden_and_says_so_where_all_are(
    tmp_path: Path, mount: str, says: str
) -> None:
    bot, name = tmp_path / "trading_bot.py", f"hidden{os.getpid()}"
    bot.write_text("print('begun', flush=True)\ninput()\n")
    # root without a capability: the others are hidden from him, too
    shell = f'mount {mount} && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", FIND, str(bot), name],
        env=clean_env(BOTLEASE_NAME=name),
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.stdout == says, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who mounts")
def test_a_check_that_cannot_tell_does_not_say_that_a_bot_runs() -> None:
    shell = 'mount -t tmpfs none /proc && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", *BOTLEASE, "check"],
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "botlease: the local check reads /proc, which is not there: it works on Linux alone\n"
