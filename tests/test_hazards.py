"""What the table of hazards (docs/reliability.md) found missing: one test a hazard, on real processes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from cgroups import Cgroup, has_cgroups
from harness import BOTLEASE, World, clean_env, until
from netns import has_pid_namespaces

from botlease import procfs
from botlease.model import Event, Healthy, Unhealthy
from botlease.work.pulse import Pulse, Rule


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wait_until(moment: float) -> None:
    until(lambda: now() > moment)


def at_a_terminal(world: World, *wrap: str) -> tuple[subprocess.Popen[bytes], int]:
    """``botlease run`` as the leader of a terminal's session, and the other end of that terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*wrap, *BOTLEASE, "run", "--ttl", "1.5", "--take-over", "--", *world.bot()],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        cwd=world.folder,  # where nohup writes what it takes away from the terminal
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no other thread is here
    )
    os.close(slave)
    return process, master


def test_closing_the_terminal_ends_the_bot_and_the_lease_is_free_at_once(sqlite_world: World) -> None:
    process, master = at_a_terminal(sqlite_world)
    try:
        sqlite_world.works(1)
        os.close(master)
        process.wait(5)
    finally:
        process.kill()
        process.wait()
    assert len(sqlite_world.stamps()) == 1  # it was not started again
    closed = now()
    sqlite_world.run()
    sqlite_world.works(2)
    assert now() - closed < 1.5  # no waiting for a lease to run out


def test_under_nohup_the_bot_outlives_its_terminal(sqlite_world: World) -> None:
    process, master = at_a_terminal(sqlite_world, "nohup")
    try:
        sqlite_world.works(1)
        os.close(master)
        closed = now()
        until(lambda: max(last for _, last in sqlite_world.stamps().values()) > closed + 0.5)
        assert process.poll() is None and len(sqlite_world.stamps()) == 1
    finally:
        process.terminate()
        process.wait(10)


def test_a_hang_up_without_a_terminal_is_the_bots(sqlite_world: World, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    script = f"trap 'echo again >>{heard}' HUP; echo begun >{heard}; while :; do sleep 0.05; done"
    run = sqlite_world.run(bot=("sh", "-c", script))
    until(heard.exists)
    run.signal(signal.SIGHUP)
    until(lambda: "again" in heard.read_text())
    assert run.process.poll() is None


def test_a_holder_taken_out_of_the_lease_by_hand_while_its_supervisor_is_stopped_is_waited_out(world: World) -> None:
    old = world.run("--deployment", "v1")
    world.works(1)
    new = world.run("--deployment", "v2", "--standby")
    new.says("standby")
    world.freeze(old.pid)
    world.sql("UPDATE bot_leases SET holder = NULL")
    world.sql("UPDATE bot_instances SET is_active = FALSE WHERE deployment = 'v1'")
    world.sql("UPDATE bot_instances SET is_active = TRUE WHERE deployment = 'v2'")
    world.works(2)

    assert world.overlap() == 0


def test_what_daemonised_beside_a_stopped_supervisor_is_dead_before_its_successor_on_this_host_begins(
    world: World,
) -> None:
    """It has no death signal, and nobody is left to sweep: continued a day later it would work on."""
    setting = {"BOTLEASE_INSTANCE_ID": "chosen-by-the-user"}  # which others of his have in their environment, too
    bystander = subprocess.Popen(["sleep", "600"], env=clean_env(**setting))
    old = world.run("--deployment", "v1", bot=world.bot(who=1, spawn=0.1), env=setting)
    until(lambda: len(old.children()) >= 4)  # reaper, bot, and what that made a daemon of
    world.run("--deployment", "v2", "--standby", bot=world.bot(who=1)).says("standby")

    def latest() -> dict[str, float]:
        """Who works -> its last moment. One write of many can be seen half done."""
        lines = (line.split() for line in world.witness.read_text().rpartition("\n")[0].splitlines())
        return {who: float(at) for who, _, at in lines}

    (before,) = latest()
    world.freeze(old.pid, *old.children())
    (after,) = until(lambda: {*latest()} - {before}, 30)
    begun = now()
    for pid in old.children():
        os.kill(pid, signal.SIGCONT)
    wait_until(begun + 0.5)
    assert latest()[before] < begun < latest()[after]
    assert bystander.poll() is None and old.process.poll() is None
    bystander.kill()
    bystander.wait()


def test_what_works_on_of_a_term_that_a_restored_file_does_not_know_is_dead_before_the_next_one_begins(
    sqlite_world: World,
) -> None:
    """The row names another holder, which is dead beyond doubt; the side-car lock knows whose term came after that."""
    world = sqlite_world
    file = Path(world.url.removeprefix("sqlite:///"))

    def latest() -> dict[str, float]:
        lines = (line.split() for line in world.witness.read_text().rpartition("\n")[0].splitlines())
        return {who: float(at) for who, _, at in lines}

    first = world.run("--deployment", "v1", bot=world.bot(who=1))
    (one,) = until(lambda: world.witness.exists() and {*latest()})
    for pid in (first.pid, *first.children()):
        os.kill(pid, signal.SIGKILL)
    first.process.wait()
    backup = file.with_suffix(".backup")
    with contextlib.closing(sqlite3.connect(file)) as source, contextlib.closing(sqlite3.connect(backup)) as copy:
        source.backup(copy)
    second = world.run("--deployment", "v2", bot=world.bot(who=1, spawn=0.1))
    (two,) = until(lambda: {*latest()} - {one})
    reaper, bot, *_ = until(lambda: (pids := second.children())[3:] and pids)
    world.freeze(second.pid, reaper, bot)  # and not what the bot made a daemon of, which has no death signal
    shutil.move(backup, file)
    world.run("--deployment", "v3", bot=world.bot(who=1))
    (three,) = until(lambda: {*latest()} - {one, two}, 30)
    begun = now()
    wait_until(begun + 0.3)
    os.kill(second.pid, signal.SIGCONT)
    wait_until(begun + 0.8)
    assert latest()[two] < begun < latest()[three]


@pytest.mark.parametrize("second", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("first", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("pair", [("supervisor", "reaper"), ("supervisor", "bot"), ("reaper", "bot")])
def test_whichever_two_of_supervisor_reaper_and_bot_stop_or_die_there_is_never_a_second_one_at_work(
    sqlite_world: World, pair: tuple[str, str], first: signal.Signals, second: signal.Signals
) -> None:
    run = sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    sqlite_world.run("--deployment", "v1").says("standby")
    reaper, bot = run.children()
    pids = {"supervisor": run.pid, "reaper": reaper, "bot": bot}
    if first is signal.SIGSTOP:
        sqlite_world.freeze(pids[pair[0]])
    else:
        os.kill(pids[pair[0]], first)
    with contextlib.suppress(ProcessLookupError):  # the bot dies with its reaper
        os.kill(pids[pair[1]], second)
    struck = now()
    try:
        # another process of the bot, the old instance's or the new one's; only a stopped bot may stay what it is
        until(lambda: len(sqlite_world.stamps()) > 1 or ("bot" in pair and now() > struck + 4), 40)
    finally:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    wait_until(now() + 0.5)
    until(lambda: max(last for _, last in sqlite_world.stamps().values()) > struck + 0.5)
    assert sqlite_world.overlap() == 0


@pytest.mark.skipif(not has_cgroups(), reason="no cgroup can be made here")
def test_a_frozen_bot_whose_reaper_died_keeps_the_lease_until_it_is_thawed_and_dead(sqlite_world: World) -> None:
    """Nobody else may begin, and the supervisor neither burns a core meanwhile nor stops renewing."""
    run = sqlite_world.run(ttl="4")  # a slow disk must not cost it the lease
    sqlite_world.works(1)
    reaper, bot = run.children()
    cgroup = Cgroup(f"botlease-test-{os.getpid()}")
    try:
        for file in cgroup.files():
            Path(file).write_text(str(bot))
        cgroup.freeze(True)
        os.kill(reaper, signal.SIGKILL)
        sqlite_world.run("--standby", ttl="4")
        frozen, before = now(), cpu(run.pid)
        wait_until(frozen + 6)
        assert len(sqlite_world.stamps()) == 1
        assert cpu(run.pid) - before < 2.4
        cgroup.freeze(False)
        sqlite_world.works(2)
        run.says("active: term 2, started")  # the row names the reaper that is dead: the term is over
        assert sqlite_world.terms() == [1, 2]
    finally:
        cgroup.freeze(False)
        cgroup.remove()
    assert sqlite_world.overlap() == 0


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_another_time_namespace_is_another_host_as_its_start_times_are_told_by_another_clock() -> None:
    command = ["unshare", "--time", "--boottime", "5000", sys.executable, "-c"]
    code = "from botlease import procfs; print(procfs.host())"
    try:
        done = subprocess.run([*command, code], capture_output=True, text=True, env=clean_env())
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("no time namespace can be made here")
    assert done.stdout.strip() and done.stdout.strip() != procfs.host()


SUSPENDED = """
import time
from botlease import clock
from botlease.work.fence import Fence
assert clock.now() - time.monotonic() > 4000, "this clock stood still"
fence = Fence()
fence.arm(clock.now() + 0.3)
time.sleep(10)
print("outlived its fence")
"""


def test_the_clock_of_trust_and_the_fence_count_the_time_for_which_a_machine_was_suspended() -> None:
    """A clock of the boot that is 5,000 s ahead of the monotonic one is what a suspend leaves behind."""
    command = ["unshare", "--time", "--boottime", "5000", "--fork", sys.executable, "-c", SUSPENDED]
    try:
        probe = subprocess.run([*command[:5], "true"], capture_output=True)
    except OSError:
        pytest.skip("no time namespace can be made here")
    if probe.returncode:
        pytest.skip("no time namespace can be made here")
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env())
    # unshare passes the signal on as far as it can
    assert done.stdout == "" and "Traceback" not in done.stderr and done.returncode in (-9, 137, 1)
    assert time.monotonic() - began < 5


async def test_a_file_whose_time_lies_in_the_future_is_one_sign_of_life_and_not_many(tmp_path: Path) -> None:
    """The wall clock was set back: what was touched before would look new for hours."""
    beat = tmp_path / "beat"
    pulse = Pulse(Rule.parse(str(beat), 0.2))
    heard: asyncio.Queue[Event] = asyncio.Queue()
    pulse.tell = heard.put_nowait
    pulse.begin(1)
    beat.touch()
    os.utime(beat, (beat.stat().st_mtime + 3600,) * 2)
    try:
        assert isinstance(await asyncio.wait_for(heard.get(), 5), Healthy)
        assert isinstance(await asyncio.wait_for(heard.get(), 5), Unhealthy)
        beat.touch()
        assert isinstance(await asyncio.wait_for(heard.get(), 5), Healthy)
    finally:
        pulse.end()


FORKS = """
import asyncio, multiprocessing, os, sys, time, botlease
fork = multiprocessing.get_context("fork")

def worker(term, says):
    try:
        term.check()
        says.put("may act")
    except botlease.LeaseLost:
        says.put("may not")
    time.sleep(60)

async def main():
    async with botlease.active("b", database=sys.argv[1], ttl=3.0) as term:
        says = fork.Queue()
        process = fork.Process(target=worker, args=(term, says))
        process.start()
        print(await asyncio.to_thread(says.get, timeout=10), flush=True)
        process.terminate()
        process.join(10)
        await asyncio.sleep(0.1)  # a signal that came to us by mistake would be heeded by now
        term.check()
        print("worker ended by", process.exitcode, flush=True)

asyncio.run(main())
"""


def test_a_worker_that_a_program_forks_has_no_term_and_its_signals_do_not_stop_the_program(
    tmp_path: Path, any_url: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(FORKS)
    done = subprocess.run(
        [sys.executable, program, any_url], env=clean_env(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["may not", "worker ended by -15"]), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_database_file_that_is_mounted_by_itself_is_refused_and_its_folder_is_not(tmp_path: Path) -> None:
    home, container = tmp_path / "home", tmp_path / "in a container"
    for folder in (home, container):
        folder.mkdir(mode=0o700)
        (folder / "lease.db").touch(0o600)
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    command = (*BOTLEASE, "run", "--", "true")
    for what, code in (("lease.db", 78), ("", 0)):
        paths = (home / what, container / what)
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *paths, *command],
            env=clean_env(BOTLEASE_DATABASE_URL=f"sqlite:///{container}/lease.db"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no mounts here: {done.stderr}")
        assert done.returncode == code, done.stderr
        assert ("mount the folder" in done.stderr) is bool(what)


def test_a_database_file_in_a_mounted_cloud_folder_is_refused(tmp_path: Path) -> None:
    """What synchronises, encrypts or fetches files behind a path is FUSE: whose locks they are is its affair."""
    real, mounted = tmp_path / "real", tmp_path / "mounted"
    real.mkdir()
    mounted.mkdir()
    bindfs = shutil.which("bindfs")
    if bindfs is None or subprocess.run([bindfs, real, mounted], capture_output=True).returncode:
        pytest.skip("no FUSE here")
    try:
        done = subprocess.run(
            [*BOTLEASE, "run", "--", "true"],
            env=clean_env(BOTLEASE_DATABASE_URL=f"sqlite:///{mounted}/new folder/lease.db"),
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run(["fusermount3", "-u", mounted], check=True)
    assert done.returncode == 78 and "network file system (FUSE)" in done.stderr
    assert list(real.iterdir()) == []


def test_a_bot_that_dumps_a_large_core_when_told_to_stop_is_gone_before_the_next_one_begins(
    sqlite_world: World,
) -> None:
    cores = sqlite_world.folder / "cores"
    cores.mkdir()
    script = f"""if 1:
        import os, signal, sys
        os.chdir({str(cores)!r})
        memory = bytearray(200 << 20)
        for at in range(0, len(memory), 4096):
            memory[at] = 1
        signal.signal(signal.SIGTERM, lambda *_: os.abort())
        print("large", os.getpid(), flush=True)
        while True:
            signal.pause()
    """
    old = sqlite_world.run(
        *("--deployment", "v1", "--stop-grace", "20"),
        bot=("prlimit", "--core=unlimited:unlimited", sys.executable, "-c", script),
        ttl="30",
    )
    old.says("large")
    pid = int(old.text().split("large ")[1].split()[0])
    sqlite_world.run("--deployment", "v2", ttl="30")
    until(lambda: sqlite_world.stamps() or procfs.start_time(pid) is None, 60)
    assert procfs.start_time(pid) is None  # dumped, and reaped, before anybody else
    sqlite_world.works(1, 60)
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith("core"):
        assert max(core.stat().st_size for core in cores.iterdir()) > 150 << 20


def test_a_supervisor_whose_log_nobody_reads_goes_on_renewing_and_hands_over(sqlite_world: World) -> None:
    reader, writer = os.pipe()
    bot = sqlite_world.bot()
    old = subprocess.Popen(
        [*BOTLEASE, "run", "--ttl", "2", "--deployment", "v1", "--", "sh", "-c", 'exec "$@" 2>&-', "sh", *bot],
        env=clean_env(BOTLEASE_DATABASE_URL=sqlite_world.url),
        stderr=writer,
    )
    try:
        sqlite_world.works(1)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)  # it is the supervisor's as well
        sqlite_world.run("--deployment", "v2", ttl="2")
        sqlite_world.works(2)
        assert sqlite_world.overlap() == 0 and sqlite_world.gap(2) < 1.5  # asked for and handed over, not waited out
        os.set_blocking(reader, False)
        read = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                read += os.read(reader, 65536)
        old.terminate()
        assert old.wait(10) == 0
        said = os.read(reader, 65536).decode()  # somebody reads again
        assert "lines before this one could not be written) SIGTERM: stopping" in said
    finally:
        old.kill()
        old.wait()
        for fd in (reader, writer):
            os.close(fd)


def test_with_its_standard_descriptors_closed_the_bot_works_and_can_be_stopped(sqlite_world: World) -> None:
    command = [*BOTLEASE, "run", "--ttl", "2", "--", *sqlite_world.bot()]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], env=clean_env(BOTLEASE_DATABASE_URL=sqlite_world.url)
    )
    try:
        sqlite_world.works(1)
        begun = now()
        until(lambda: max(last for _, last in sqlite_world.stamps().values()) > begun + 2.5)  # beyond one ttl
        assert len(sqlite_world.stamps()) == 1
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_a_terminal_that_nobody_reads_holds_nobody_up(sqlite_world: World) -> None:
    process, master = at_a_terminal(sqlite_world)
    try:
        sqlite_world.works(1)
        again = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(again, b"x" * 64)
        os.close(again)
        sqlite_world.run("--deployment", "another", ttl="1.5")
        sqlite_world.works(2)
        assert sqlite_world.overlap() == 0 and sqlite_world.gap(2) < 1  # handed over
    finally:
        process.kill()
        process.wait()
        os.close(master)


LOSES_AN_ANSWER = """
import asyncio, sys, botlease
from botlease.stores import StoreError
from botlease.stores.sqlite import SqliteStore

real, lost = SqliteStore.acquire, []

async def acquire(self, *args, **options):
    grant = await real(self, *args, **options)
    if grant is not None and not lost:
        lost.append(grant)
        raise StoreError("the answer was lost")
    return grant

SqliteStore.acquire = acquire

async def main():
    async with botlease.active("bot", database=sys.argv[1], ttl=1.5, deployment="v2", standby=True) as term:
        print("works", term.number, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_what_was_left_is_killed_though_the_answer_to_the_acquire_was_lost(sqlite_world: World, tmp_path: Path) -> None:
    """The lease is given back then, and the term that begins is another one, which was not taken after an expiry."""
    old = sqlite_world.run("--deployment", "v1", bot=sqlite_world.bot(spawn=0.1))
    until(lambda: len(old.children()) >= 4)
    program = tmp_path / "program.py"
    program.write_text(LOSES_AN_ANSWER)
    new = subprocess.Popen(
        [sys.executable, program, sqlite_world.url], env=clean_env(), stdout=subprocess.PIPE, text=True
    )
    try:
        with contextlib.closing(sqlite3.connect(sqlite_world.url.removeprefix("sqlite:///"))) as db:
            until(lambda: db.execute("SELECT count(*) FROM bot_instances").fetchone()[0] == 2)
            beat = db.execute("SELECT beat FROM bot_leases").fetchone()[0]
            until(lambda: db.execute("SELECT beat FROM bot_leases").fetchone()[0] > beat + 2**21)  # it has been seen
        sqlite_world.freeze(old.pid, *old.children())
        left = old.children()
        assert new.stdout is not None and new.stdout.readline() == "works 3\n"
        assert not [pid for pid in left if procfs.start_time(pid) is not None]
    finally:
        new.kill()
        new.wait()
        new.stdout.close()  # type: ignore[union-attr]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as somebody else")
def test_a_name_that_is_cut_in_the_middle_of_a_character_stops_no_search_for_what_is_left(tmp_path: Path) -> None:
    from botlease.work import proof

    named = tmp_path / "телеграмбот"
    named.write_bytes(Path("/bin/sleep").read_bytes())
    named.chmod(0o755)
    with subprocess.Popen([named, "60"]) as process:
        until(lambda: "телегра".encode() in Path(f"/proc/{process.pid}/comm").read_bytes())
        os.seteuid(65534)
        try:
            # not by the whole search: what this process started itself is left out there
            has = proof._has(process.pid, frozenset({b"NOBODY=HAS_THIS"}))
        finally:
            os.seteuid(0)
            process.kill()
    assert has is False


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--warm",)], ids=["cold", "warm"])
def test_whoever_starts_the_bot_has_one_thread_whose_end_is_its_own(
    sqlite_world: World, options: tuple[str, ...]
) -> None:
    """The death signal is sent when the thread that forked ends, and not when its process does."""
    run = sqlite_world.run(*options)
    sqlite_world.works(1)
    ((bot, _),) = sqlite_world.stamps()
    reaper = procfs.parent(bot)
    assert procfs.parent(reaper) == run.pid
    assert len(os.listdir(f"/proc/{reaper}/task")) == 1


def test_of_thousands_of_orphans_none_is_left_unburied(sqlite_world: World, tmp_path: Path) -> None:
    done = tmp_path / "done"
    run = sqlite_world.run(
        bot=("sh", "-c", f"for n in $(seq 2000); do (true & exit); done; touch {done}; exec sleep 600")
    )
    until(done.exists, 60)

    def zombies() -> list[int]:
        states = {pid: procfs.stat(pid) for pid in run.children()}
        return [pid for pid, fields in states.items() if fields is not None and fields[0] == b"Z"]

    until(lambda: not zombies())
    assert run.process.poll() is None


@pytest.mark.long
def test_of_thirty_supervisors_that_start_at_once_one_works(sqlite_world: World) -> None:
    runs = [sqlite_world.run("--standby", "--deployment", "v1", ttl="10") for _ in range(30)]
    for run in runs:
        until(lambda run=run: "standby" in run.text() or "active" in run.text(), 60)
    sqlite_world.works(1)
    (at_work,) = sqlite_world.stamps()
    for run in runs:
        if at_work[0] in run.children():
            run.signal(signal.SIGTERM)
    sqlite_world.works(2, 60)
    assert sqlite_world.overlap() == 0 and sqlite_world.terms() == [1, 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a program that changes its user")
def test_a_set_user_id_program_stays_ours_to_kill_and_dies_with_its_supervisor(sqlite_world: World) -> None:
    """Run with its owner's rights it would lose the signal that is sent when its parent dies."""
    program = sqlite_world.folder / "sleeper"
    shutil.copyfile(shutil.which("sleep") or "/bin/sleep", program)
    os.chown(program, 65534, 65534)
    program.chmod(0o4755)
    run = sqlite_world.run(bot=(str(program), "60"))
    run.says("active")
    bot = until(lambda: [p for p in run.children() if b"sleeper" in Path(f"/proc/{p}/cmdline").read_bytes()])
    (pid,) = bot  # type: ignore[misc]
    assert "Uid:\t0\t0\t0" in Path(f"/proc/{pid}/status").read_text()
    for victim in (*[p for p in run.children() if p != pid], run.pid):
        os.kill(victim, signal.SIGKILL)
    until(lambda: procfs.start_time(pid) is None, 2)


def test_beside_a_stopped_supervisor_the_reaper_ends_the_bot_itself_and_outlives_it(sqlite_world: World) -> None:
    """The kernel's timer, a moment later, would have to kill the reaper to get at the bot."""
    run = sqlite_world.run(ttl="3")  # that moment is a tenth of the trust: of 1.2 s too little beside three other tests
    sqlite_world.works(1)
    ((bot, _),) = sqlite_world.stamps()
    (reaper,) = [p for p in run.children() if p != bot]
    sqlite_world.freeze(run.pid)
    until(lambda: procfs.start_time(bot) is None)
    fence = time.monotonic() + 0.5
    until(lambda: time.monotonic() > fence)
    assert procfs.start_time(reaper) is not None


def test_ctrl_z_stops_neither_supervisor_nor_bot(sqlite_world: World) -> None:
    """Stopped it could not renew, and the bot would die at the end of trust."""
    world = sqlite_world
    run = subprocess.Popen(
        [*BOTLEASE, "run", "--ttl", "1.5", "--", *world.bot()],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        process_group=0,  # a job of a shell: in a session of its own the kernel would ignore the signal by itself
    )
    try:
        world.works(1)
        os.killpg(run.pid, signal.SIGTSTP)
        stopped = time.clock_gettime(time.CLOCK_BOOTTIME)
        until(lambda: max(last for _, last in world.stamps().values()) > stopped + 2.0)
        assert len(world.stamps()) == 1 and (procfs.stat(run.pid) or [b""])[0] not in (b"T", b"t")
    finally:
        run.send_signal(signal.SIGCONT)
        run.terminate()
        run.wait(10)


@pytest.mark.parametrize("ttls", [("6", "1.5"), ("1.5", "6")])
def test_the_longer_of_two_ttls_is_waited_out_between_hosts(
    tmp_path: Path, postgres_url: str, ttls: tuple[str, str]
) -> None:
    apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no process namespace can be made here")
    world = World(tmp_path, postgres_url)
    try:
        first = world.run("--deployment", "v1", ttl=ttls[0])
        world.works(1)
        world.run("--deployment", "v1", ttl=ttls[1], wrap=apart).says("standby")
        ((bot, _),) = world.stamps()
        stopped = [first.pid, *(p for p in first.children() if p != bot)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        world.works(2, 30)
        assert world.overlap() == 0 and world.gap(2) > 1.0  # the lock-delay
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    finally:
        world.close()


AS_PID_1 = """
import os, sys, time
from botlease import clock
from botlease.work.fence import Fence
assert os.getpid() == 1
fence = Fence()
fence.arm(clock.now() + 0.2)
if sys.argv[1] == "c":
    sum(range(10**12))  # in C, with the lock of the interpreter
time.sleep(10)
print("outlived its fence")
"""


@pytest.mark.skipif(not has_pid_namespaces(), reason="needs pid namespaces")
@pytest.mark.parametrize("stuck", ["sleep", "c"])
def test_the_fence_ends_a_program_that_is_pid_1_of_its_container_too(stuck: str) -> None:
    """The kernel drops a SIGKILL that comes from within the first process of a pid namespace."""
    began = time.monotonic()
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", AS_PID_1, stuck]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), timeout=60)
    assert done.stdout == "" and "Traceback" not in done.stderr and done.returncode == signal.SIGRTMAX
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("127.0.0.1:8080/health", "a URL begins with http://"),
        ("localhost:8080", "a URL begins with http://"),
        ("http://127.0.0.1:80800/", "is no address"),
        ("http://127.0.0.1:port/", "is no address"),
        ("http:///health", "is no address"),
    ],
)
def test_a_rule_that_could_never_be_fulfilled_is_refused(rule: str, says: str) -> None:
    """A good bot was rolled back for it, and its deployment put into quarantine."""
    with pytest.raises(ValueError, match=says):
        Rule.parse(rule, 30)
    assert Rule.parse("file:a:8080", 30).kind == "file" and Rule.parse("/tmp/x", 30).kind == "file"


async def test_a_line_as_long_as_a_book_costs_no_renewal() -> None:
    pulse = Pulse(Rule.parse("stdout:.*got updates", 30))
    fd = pulse.output()
    with open(fd, "wb", buffering=0) as out:
        began = time.monotonic()
        out.write(b"x" * 120_000 + b"\n")  # the square of it, in C, with the lock of the interpreter: minutes
    pulse.rest()
    assert time.monotonic() - began < 5


async def test_a_dead_bots_late_line_proves_nothing_of_the_next_one() -> None:
    pulse = Pulse(Rule.parse("stdout:beat", 30))
    old = pulse.output()
    new = pulse.output()  # the next one begins
    os.write(old, b"beat\n")
    os.close(old)
    os.close(new)
    for thread in [t for t in threading.enumerate() if t.name == "botlease-stdout"]:
        thread.join(5)
    assert pulse._last == 0
