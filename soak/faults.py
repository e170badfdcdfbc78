"""What the nemesis does to whole deployments, one function a kind. Each undoes what it did before it returns."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg
from cgroups import has_cgroups
from proxy import ANSWERS, ASKS, Link
from servers import set_clock

from soak.agreement import Harm
from soak.deployments import Deployment, Host, World, has_netns
from soak.oracle import Oracle, now

Fault = Callable[["Scene"], Awaitable[bool | None]]
"""False where there was nothing to do it to: it does not count."""
KINDS: dict[str, tuple[Fault, Callable[[World], bool]]] = {}
NOT_DONE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The database did not do it. The last two are no PostgresError: a connection that another fault ends under a query."""


def postgres(w: World) -> bool:
    return w.store == "postgres"


def sqlite(w: World) -> bool:
    return w.store == "sqlite"


def cgroups(w: World) -> bool:
    return has_cgroups()


def netns(w: World) -> bool:
    return postgres(w) and has_netns()


def fault(*needs: Callable[[World], bool]) -> Callable[[Fault], Fault]:
    def add(function: Fault) -> Fault:
        KINDS[function.__name__] = (function, lambda w: all(n(w) for n in needs))
        return function

    return add


def possible(w: World) -> list[str]:
    return [name for name, (_, can) in KINDS.items() if can(w)]


@dataclass
class Scene:
    """The world, and whom this fault is for."""

    world: World
    oracle: Oracle
    rng: random.Random

    def whom(self, can: Callable[[Deployment], bool] = lambda d: True) -> Deployment:
        """Mostly the one at work; of those that can."""
        self.oracle.read()
        living = [d for d in self.world.deployments if d.tree()] or self.world.deployments
        living = [d for d in living if can(d)] or living
        working = [d for d in living if not d.retired and self.works(d)]
        return self.rng.choice(working if working and self.rng.random() < 0.7 else living)

    def works(self, d: Deployment) -> bool:
        latest = max(self.oracle.works.values(), key=lambda w: w.last, default=None)
        with contextlib.suppress(OSError):
            return latest is not None and latest.who.partition("/")[0] in d.log.read_text()
        return False

    def host(self) -> Host:
        return self.whom().host

    @property
    def while_(self) -> float:
        """How long: from a hiccup to three ttl."""
        return self.rng.choice((0.3, 0.8, 1.1, 1.5, 2.0, 3.0)) * self.world.ttl

    async def wait(self) -> None:
        await asyncio.sleep(self.while_)

    def harms(self, kind: str) -> None:
        """What follows leaves this in the database (:class:`soak.agreement.Harm`)."""
        self.oracle.read()
        self.world.harms.append(Harm(kind, self.oracle.highest))

    async def sql(self, *statements: str) -> list[tuple[object, ...]] | None:
        """As an operator, past everything. The rows of the last one; None where the database did not do it."""
        rows: list[tuple[object, ...]] | None = None
        if self.world.primary is None:

            def run() -> list[tuple[object, ...]]:
                out: list[tuple[object, ...]] = []
                db = sqlite3.connect(f"file:{self.world.file}?mode=rw", uri=True, timeout=2, isolation_level=None)
                try:
                    for s in statements:
                        out = db.execute(s).fetchall()
                finally:
                    db.close()
                return out

            with contextlib.suppress(sqlite3.Error):
                rows = await asyncio.to_thread(run)
            return rows
        with contextlib.suppress(*NOT_DONE):
            c = await asyncpg.connect(self.world.direct, timeout=3, command_timeout=3)
            try:
                done = [await c.fetch(s) for s in statements]
                rows = [tuple(r) for r in done[-1]]
            finally:
                await c.close(timeout=2)
        return rows

    async def live_instances(self) -> list[str]:
        rows = await self.sql("SELECT instance_id FROM bot_instances WHERE ended_at IS NULL")
        return sorted(str(r[0]) for r in rows or [])


# Processes -------------------------------------------------------------------------------------------------------


async def _stop(s: Scene, part: str) -> bool:
    d = s.whom(lambda d: part != "everything" or not d.escapes)
    stopped = d.part(part)
    if not d.send(part, signal.SIGSTOP):
        return False
    await s.wait()
    _continue(s, [*stopped, *d.tree()])
    return True


def _continue(s: Scene, pids: list[int]) -> None:
    """Also those whose parent has ended meanwhile."""
    s.rng.shuffle(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@fault()
async def stop_supervisor(s: Scene) -> bool:
    return await _stop(s, "supervisor")


@fault()
async def stop_reaper(s: Scene) -> bool:
    return await _stop(s, "reaper")


@fault()
async def stop_bot(s: Scene) -> bool:
    return await _stop(s, "bot")


@fault()
async def stop_everything(s: Scene) -> bool:
    return await _stop(s, "everything")


@fault()
async def kill_supervisor(s: Scene) -> bool:
    return s.whom().send("supervisor", signal.SIGKILL)


@fault()
async def kill_reaper(s: Scene) -> bool:
    return s.whom().send("reaper", signal.SIGKILL)


@fault()
async def kill_bot(s: Scene) -> bool:
    return s.whom().send("bot", signal.SIGKILL)


@fault()
async def kill_everything(s: Scene) -> bool:
    return s.whom().send("everything", signal.SIGKILL)


@fault()
async def kill_all_deployments(s: Scene) -> bool:
    sent = [d.send("everything", signal.SIGKILL) for d in s.world.deployments]
    return any(sent)


@fault()
async def stop_all_deployments(s: Scene) -> bool:
    """A machine that is suspended, as far as that can be done to processes."""
    deployments = [d for d in s.world.deployments if not d.escapes]
    stopped = [pid for d in deployments for pid in d.tree()]
    sent = [d.send("everything", signal.SIGSTOP) for d in deployments]
    await s.wait()
    _continue(s, [*stopped, *(pid for d in deployments for pid in d.tree())])
    return any(sent)


@fault()
async def terminate(s: Scene) -> bool:
    """The platform restarts it: a stop signal, then the same deployment again."""
    if not s.whom().send("supervisor", signal.SIGTERM):
        return False
    await asyncio.sleep(s.rng.uniform(0, 1))
    return True


@fault(cgroups)
async def freeze(s: Scene) -> bool:
    """As ``docker pause`` does it. On thawing everything runs at once, the late and the fence."""
    d = s.whom(lambda d: not d.escapes)
    if d.cgroup is None or d.escapes or not d.tree():
        return False
    took = d.cgroup.freeze(True)
    await s.wait()
    s.oracle.thaws.append(now())
    d.cgroup.freeze(False)
    return took


@fault(cgroups)
async def freeze_all(s: Scene) -> bool:
    frozen = [d.cgroup for d in s.world.deployments if d.cgroup is not None and not d.escapes]
    took = [cgroup.freeze(True) for cgroup in frozen]
    await s.wait()
    s.rng.shuffle(frozen)
    for cgroup in frozen:
        s.oracle.thaws.append(now())
        cgroup.freeze(False)
    return any(took)


@fault(cgroups)
async def starve(s: Scene) -> bool:
    """1 to 5 % of a core for a whole deployment."""
    d = s.whom()
    if d.cgroup is None or not d.cgroup.has("cpu"):
        return False
    took = d.cgroup.starve(s.rng.choice((0.01, 0.02, 0.05)))
    await asyncio.sleep(2 * s.while_)
    d.cgroup.starve(None)
    return took


HOG = """
import os
open("/proc/self/oom_score_adj", "w").write("-999")
taken = [os.urandom(1 << 20) for _ in range(60)]
"""


@fault(cgroups)
async def out_of_memory(s: Scene) -> bool:
    """The kernel kills in this deployment until there is memory again."""
    d = s.whom()
    if d.cgroup is None or not d.cgroup.has("memory") or not d.tree():
        return False
    killed = d.cgroup.killed()
    d.cgroup.limit(d.cgroup.used() + (8 << 20))
    files = d.cgroup.files()
    script = "".join(f"echo $$ >{f} || exit 99; " for f in files) + 'exec "$@"'
    hog = subprocess.Popen(["sh", "-c", script, "sh", sys.executable, "-S", "-c", HOG], stderr=subprocess.DEVNULL)
    end = now() + 3
    while hog.poll() is None and now() < end:
        await asyncio.sleep(0.05)
    hog.kill()
    d.cgroup.limit(None)
    # Frozen by the fault beside this one it dies when that one is undone: to wait for it in our loop would be for ever.
    await asyncio.to_thread(hog.wait)
    return d.cgroup.killed() > killed


# Deployments -----------------------------------------------------------------------------------------------------


async def _redeploy(s: Scene, **odd: object) -> Deployment:
    w = s.world
    host = s.rng.choice(w.hosts)
    return w.deploy(host, f"v{w.count}", **odd)


@fault()
async def deploy(s: Scene) -> None:
    """A new deployment, and the platform stops the oldest somewhat later."""
    old = s.world.deployments[0]
    await _redeploy(s)
    await asyncio.sleep(s.rng.uniform(0, 2.5))
    await old.retire(s.rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)))


@fault()
async def deploy_a_broken_one(s: Scene) -> None:
    new = await _redeploy(s, inside=False, broken=s.rng.uniform(0.05, 1.0))
    await asyncio.sleep(s.rng.uniform(2, 5))
    await new.retire()


@fault()
async def deploy_two_at_once(s: Scene) -> None:
    old = s.world.deployments[:2]
    await _redeploy(s)
    await _redeploy(s)
    await asyncio.sleep(s.rng.uniform(0, 2))
    await asyncio.gather(*(d.retire() for d in old))


@fault()
async def roll_back(s: Scene) -> None:
    """The key of an older deployment once more."""
    w = s.world
    keys = sorted({d.key for d in w.deployments})
    w.deploy(s.rng.choice(w.hosts), s.rng.choice(["v0", *keys]))
    await asyncio.sleep(s.rng.uniform(0.5, 2))
    newest = w.deployments[-2]
    await newest.retire()


# Network ---------------------------------------------------------------------------------------------------------


async def _drop(s: Scene, *chains: str) -> None:
    host = s.host()
    for chain in chains:
        host.iptables("-A", chain, "!", "-i" if chain == "INPUT" else "-o", "lo", "-j", "DROP")
    await s.wait()
    host.iptables("-F")


@fault(netns)
async def drop_both_ways(s: Scene) -> None:
    await _drop(s, "INPUT", "OUTPUT")


@fault(netns)
async def drop_answers(s: Scene) -> None:
    await _drop(s, "INPUT")


@fault(netns)
async def drop_questions(s: Scene) -> None:
    await _drop(s, "OUTPUT")


@fault(netns)
async def drop_on_all_hosts(s: Scene) -> None:
    for host in s.world.hosts:
        host.iptables("-A", "INPUT", "!", "-i", "lo", "-j", "DROP")
    await s.wait()
    for host in s.world.hosts:
        host.iptables("-F")


@fault(netns)
async def lose_packets(s: Scene) -> None:
    host = s.host()
    host.iptables("-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
    await asyncio.sleep(2 * s.while_)
    host.iptables("-F")


@fault(netns)
async def reject_with_reset(s: Scene) -> None:
    host = s.host()
    host.iptables("-A", "OUTPUT", "-p", "tcp", "!", "-o", "lo", "-j", "REJECT", "--reject-with", "tcp-reset")
    await s.wait()
    host.iptables("-F")


async def _stall(s: Scene, *directions: str) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    proxy.stall(*directions)
    await s.wait()
    if s.rng.random() < 0.3:
        proxy.reset()
    proxy.go_on()


@fault(postgres)
async def stall(s: Scene) -> None:
    await _stall(s)


@fault(postgres)
async def stall_questions(s: Scene) -> None:
    """Held up, and delivered late."""
    await _stall(s, ASKS)


@fault(postgres)
async def stall_answers(s: Scene) -> None:
    await _stall(s, ANSWERS)


@fault(postgres)
async def reset_connections(s: Scene) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    for _ in range(s.rng.randint(1, 5)):
        proxy.reset()
        await asyncio.sleep(s.rng.uniform(0, 0.3))


@fault(postgres)
async def refuse_connections(s: Scene) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    proxy.refuse = True
    proxy.reset()
    await s.wait()
    proxy.refuse = False


@fault(postgres)
async def cut_before_the_answer(s: Scene) -> None:
    """What was asked is done, and whoever asked does not learn of it. Each connection, for a while."""
    proxy = s.host().proxy
    assert proxy is not None

    def cut(link: Link, direction: str, message: bytes) -> bool:
        if direction == ANSWERS and message[:1] == b"C":  # CommandComplete
            link.reset()
            return False
        return True

    proxy.on_message = cut
    await s.wait()
    proxy.on_message = None


# The database ------------------------------------------------------------------------------------------------------


@fault(postgres)
async def kill_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    await asyncio.to_thread(db.signal, signal.SIGKILL)
    await s.wait()
    await asyncio.to_thread(db.start)


@fault(postgres)
async def stop_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    db.signal(signal.SIGSTOP)
    await s.wait()
    db.signal(signal.SIGCONT)


@fault(postgres)
async def restart_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    await asyncio.to_thread(db.shut_down)
    await asyncio.to_thread(db.start)


@fault(postgres)
async def fail_over(s: Scene) -> None:
    """The replica is promoted without the last commits of the primary, which is dead by then."""
    w = s.world
    old = w.primary
    assert old is not None
    s.harms("lost")
    new = await asyncio.to_thread(w.new_replica)
    for pid in old.processes("walsender"):
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(s.rng.choice((0.0, 0.3, 1.0, 2.0, 4.0)) * w.ttl)
    await asyncio.to_thread(old.signal, signal.SIGKILL)
    await asyncio.sleep(s.rng.choice((0.0, 0.3, 1.5)) * w.ttl)
    await asyncio.to_thread(new.promote)
    w.point_at(new)
    await asyncio.to_thread(old.stop)


@fault(postgres)
async def ask_a_standby_database(s: Scene) -> None:
    """One host is led to a replica that nobody promoted: by a stale name, by a load balancer."""
    host, standby = s.host(), await asyncio.to_thread(s.world.new_replica)
    assert host.proxy is not None
    there, host.proxy.target = host.proxy.target, standby.port
    host.proxy.reset()
    await s.wait()
    host.proxy.target = there
    host.proxy.reset()
    await asyncio.to_thread(standby.stop)


@fault(postgres)
async def make_the_database_read_only(s: Scene) -> bool:
    """As hosts do when the disk is nearly full, or in a switch-over."""
    ours = "SET default_transaction_read_only = off"
    made = await s.sql(ours, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    await s.wait()
    for _ in range(20):
        done = await s.sql(ours, "ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
        if done:
            break
        await asyncio.sleep(0.2)
    return made is not None


@fault(lambda w: postgres(w) and w.library is not None)
async def step_the_databases_clock(s: Scene) -> None:
    sign = s.rng.choice((-1, 1))
    s.harms("clock")
    s.world.step_clock(sign * s.rng.choice((1, 5, 60, 3600, 86_400)))
    await s.wait()


@fault(lambda w: postgres(w) and w.library is not None)
async def drift_the_databases_clock(s: Scene) -> None:
    """It runs a tenth too fast or too slow, and as each of its processes counts from its start, they differ as well."""
    s.harms("clock")
    s.world.step_clock(0, s.rng.choice((0.9, 1.1)))
    await s.wait()
    s.world.step_clock(0)


@fault(lambda w: w.library is not None)
async def step_a_supervisors_clock(s: Scene) -> bool:
    stepped = [d for d in s.world.deployments if d.traits.fake_time]
    for d in stepped:
        set_clock(d.clock, s.rng.choice((-1, 1)) * s.rng.choice((1, 5, 60, 3600, 86_400)))
    await s.wait()
    return bool(stepped)


@fault(postgres)
async def lock_the_tables(s: Scene) -> bool:
    """A migration, a VACUUM FULL: nothing can be read or written."""
    done = False
    with contextlib.suppress(*NOT_DONE):
        c = await asyncpg.connect(s.world.direct, timeout=3)
        try:
            await c.execute("BEGIN; SET LOCAL lock_timeout = '2s'; LOCK TABLE bot_leases, bot_instances")
            done = True
            await s.wait()
        finally:
            await c.close(timeout=2)
    return done


@fault(postgres)
async def end_sessions(s: Scene) -> bool:
    return bool(
        await s.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'botlease%'")
    )


LOCKER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
db.execute("BEGIN EXCLUSIVE")
print(flush=True)
time.sleep(60)
"""


@fault(sqlite)
async def lock_the_file(s: Scene) -> None:
    """A writer that is stopped inside its transaction."""
    locker = subprocess.Popen(
        [sys.executable, "-S", "-c", LOCKER, str(s.world.file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert locker.stdout is not None
    await asyncio.to_thread(locker.stdout.readline)
    locker.send_signal(signal.SIGSTOP)
    await s.wait()
    locker.kill()
    locker.wait()
    locker.stdout.close()


@fault(sqlite)
async def delete_the_file(s: Scene) -> None:
    s.harms("emptied")
    s.world.file.unlink(missing_ok=True)
    if s.rng.random() < 0.3:
        s.world.file.touch(0o600)
    await s.wait()


@fault(sqlite)
async def rename_the_file(s: Scene) -> None:
    away = s.world.file.with_suffix(".away")
    s.harms("lost")
    with contextlib.suppress(OSError):
        s.world.file.rename(away)
        await s.wait()
        away.rename(s.world.file)


@fault(sqlite)
async def restore_an_older_file(s: Scene) -> None:
    """A backup is copied over it, or takes its place."""
    backup = s.world.file.with_suffix(".backup")
    s.harms("lost")
    with contextlib.suppress(OSError):
        shutil.copy(s.world.file, backup)
        await s.wait()
        if s.rng.random() < 0.2:
            shutil.copyfile(backup, s.world.file)  # under whoever has it open: it may be damaged by that
        else:
            backup.replace(s.world.file)


# The operator -------------------------------------------------------------------------------------------------------


@fault()
async def operator_deactivates(s: Scene) -> bool:
    done = await s.sql("UPDATE bot_instances SET is_active = FALSE")
    await s.wait()
    await _promote(s)
    return done is not None


async def _promote(s: Scene) -> None:
    for _ in range(100):
        living = await s.live_instances()
        if living:
            chosen = s.rng.choice(living)
            await s.sql(f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{chosen}'")
            # A supervisor that is stopped in the middle of a transaction can keep the file locked.
            if await s.sql("SELECT 1 FROM bot_instances WHERE is_active"):
                return
        await asyncio.sleep(0.1)


@fault()
async def operator_promotes(s: Scene) -> None:
    for _ in range(s.rng.randint(1, 4)):
        await _promote(s)
        await asyncio.sleep(s.rng.uniform(0, 0.4))


@fault()
async def operator_deletes_the_lease(s: Scene) -> bool:
    s.harms("edited")
    return await s.sql("DELETE FROM bot_leases") is not None


@fault()
async def operator_deletes_the_instances(s: Scene) -> bool:
    done = await s.sql("DELETE FROM bot_instances")
    await _promote(s)
    return done is not None


@fault()
async def operator_pauses(s: Scene) -> bool:
    paused = await s.sql("UPDATE bot_leases SET paused = TRUE")
    await s.wait()
    for _ in range(50):
        await s.sql("UPDATE bot_leases SET paused = FALSE")
        if await s.sql("SELECT 1 FROM bot_leases WHERE paused") == []:
            break
        await asyncio.sleep(0.1)
    return paused is not None


@fault()
async def operator_edits_the_lease(s: Scene) -> bool:
    s.harms("edited")
    edits = ("beat = beat + 1000", "beat = 0", "nonce = 'x'", "term = term + 5", "ttl = 2 * ttl", "holder = NULL")
    done = await s.sql(f"UPDATE bot_leases SET {s.rng.choice(edits)}")
    await s.sql("UPDATE bot_leases SET ttl = 1.5 WHERE ttl > 10")
    return done is not None
