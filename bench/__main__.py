"""``scripts/bench``: handover gap, crash takeover, memory, idle CPU, statements, start-up; on SQLite and PostgreSQL.

Times and memory stand beside their floors, measured in the same run on the same machine: a number alone says more
about the machine than about us. The floor of the database is one beat of the holder each 2 s, of the processor nothing.
``--quick`` takes fewer samples, ``--gateway`` measures the gateway alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from harness import BOTLEASE, WITNESS, Run, World, clean_env, until
from servers import Postgres

QUICK = "--quick" in sys.argv
N = 8 if QUICK else 30
CRASHES = 4 if QUICK else 12
WINDOW = 10.0 if QUICK else 60.0
PYTHON = (sys.executable, "-I", "-S")


def boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ms(values: list[float]) -> str:
    values = sorted(values)
    return f"{median(values) * 1000:7.1f} ms median, {values[-1] * 1000:.1f} max of {len(values)}"


def line(label: str, text: str) -> None:
    print(f"  {label:<34}{text}", flush=True)


# Floors ----------------------------------------------------------------------------------------------------------


def floor_child_start(folder: Path) -> list[float]:
    """From spawn to the first stamp of the bot that is used below."""
    out = []
    for n in range(N):
        path = folder / f"floor{n}"
        began = boot()
        process = subprocess.Popen([*PYTHON, WITNESS, str(path)])
        until(lambda p=path: p.exists() and b"\n" in p.read_bytes())
        out.append(float(path.read_text().split()[2]) - began)
        process.kill()
        process.wait()
    return out


def timed(command: list[str], env: dict[str, str] | None = None) -> list[float]:
    out = []
    for _ in range(N):
        began = time.perf_counter()
        subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
        out.append(time.perf_counter() - began)
    return out


def pss(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if row.startswith("Pss:"):
                total += int(row.split()[1])
    return total / 1024


def rss(pids: list[int]) -> float:
    return sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu(pids: list[int]) -> float:
    """Seconds of processor time so far, to the nanosecond where the kernel tells."""
    total = 0.0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def floor_memory() -> float:
    code = "import asyncio, time; print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    value = pss([process.pid])
    process.kill()
    process.wait()
    process.stdout.close()
    return value


# Ours --------------------------------------------------------------------------------------------------------------


def bot(world: World) -> tuple[str, ...]:
    return (*PYTHON, WITNESS, str(world.witness))


def operator(url: str) -> Callable[[str], list[str]]:
    def run(sql: str) -> list[str]:
        if url.startswith("sqlite"):
            db = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=5)
            with db:
                rows = [r[0] for r in db.execute(sql).fetchall()]
            db.close()
            return rows
        return asyncio.run(_postgres(url, sql))

    return run


async def _postgres(url: str, sql: str) -> list[str]:
    import asyncpg

    connection = await asyncpg.connect(url)
    rows = [r[0] for r in await connection.fetch(sql)]
    await connection.close()
    return rows


def handovers(world: World) -> list[float]:
    """Planned: two instances run, the operator's UPDATE moves the bot to and fro."""
    a = world.run("--deployment", "v1", bot=bot(world), ttl="10")
    world.works(1)
    world.run("--deployment", "v1", bot=bot(world), ttl="10").says("standby")
    sql = operator(world.url)
    gaps = []
    for n in range(N):
        (other,) = sql("SELECT instance_id FROM bot_instances WHERE NOT is_active AND ended_at IS NULL")
        sql(f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{other}'")
        world.works(n + 2)
        time.sleep(0.1)
        spans = sorted(world.stamps().values())
        gaps.append(spans[-1][0] - spans[-2][1])
    assert a.process.poll() is None and world.overlap() == 0
    return gaps


def crashes(world: World) -> list[float]:
    """The supervisor is killed with -9 beside a standby of the same host."""
    holder = world.run("--deployment", "v1", bot=bot(world), ttl="10")
    world.works(1)
    took = []
    for n in range(CRASHES):
        standby = world.run("--deployment", "v1", bot=bot(world), ttl="10")
        standby.says("standby")
        time.sleep(0.2)
        killed = boot()
        holder.signal(signal.SIGKILL)
        holder.wait()
        world.works(n + 2)
        took.append(max(begin for begin, _ in world.stamps().values()) - killed)
        holder = standby
    assert world.overlap() == 0
    return took


def commits(world: World) -> int:
    if world.url.startswith("sqlite"):
        with Path(world.url.removeprefix("sqlite:///")).open("rb") as f:
            f.seek(24)
            return int.from_bytes(f.read(4), "big")  # the file change counter
    sql = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    return int(operator(world.url)(sql)[0])


def ours(run: Run) -> list[int]:
    """Supervisor and reaper; the bot is the user's."""
    return [run.pid, *(p for p in run.children() if b"botlease" in Path(f"/proc/{p}/cmdline").read_bytes())]


def idle(world: World) -> dict[str, str]:
    holder = world.run("--deployment", "v1", bot=("sleep", "1000"), ttl="10")
    holder.says("active")
    time.sleep(1)
    alone = pss(ours(holder))
    standby = world.run("--deployment", "v1", bot=("sleep", "1000"), ttl="10")
    standby.says("standby")
    time.sleep(3)
    out = {"holder, alone": f"PSS {alone:5.1f} MB (nobody to share pages with)"}
    before = {name: cpu(ours(run)) for name, run in (("holder", holder), ("standby", standby))}
    written = commits(world)
    began = boot()
    time.sleep(WINDOW)
    span = boot() - began
    rate = (commits(world) - written) / span
    for name, run in (("holder", holder), ("standby", standby)):
        pids = ours(run)
        used = (cpu(pids) - before[name]) / span
        out[name] = f"PSS {pss(pids):5.1f} MB, RSS {rss(pids):5.1f} MB, CPU {used * 100:.3f} % of a core"
    out["database"] = f"{rate:.2f} statements/s of both (each a transaction; the holder's beats alone: 0.50)"
    return out


def measure(name: str, url: Callable[[], str], folder: Path, floors: dict[str, float]) -> None:
    print(f"\n{name}")
    worlds = []

    def world() -> World:
        path = folder / f"{name}{len(worlds)}"
        path.mkdir()
        worlds.append(World(path, url()))
        return worlds[-1]

    try:
        gaps = handovers(world())
        line("planned handover, cold", ms(gaps))
        line("  beyond the bot's own start", f"{(median(gaps) - floors['start']) * 1000:7.1f} ms")
        took = crashes(world())
        line("kill -9 to the next one's first act", ms(took))
        line("  beyond the bot's own start", f"{(median(took) - floors['start']) * 1000:7.1f} ms")
        for w in worlds:
            w.close()
        for who, text in idle(world()).items():
            line(f"idle {who}", text)
        env = clean_env(BOTLEASE_DATABASE_URL=url())
        times = timed([*BOTLEASE, "run", "--", "true"], env)
        line("start-up of `botlease run -- true`", ms(times))
        line("  beyond a bare Python's", f"{(median(times) - floors['python']) * 1000:7.1f} ms")
    finally:
        for w in worlds:
            w.close()


def gateway(folder: Path) -> None:
    from bench.gateway import measure as measure_gateway

    print("\nThe Bot API gateway")
    world = World(folder, f"sqlite:///{folder}/gateway.db")
    try:
        measure_gateway(world, 2000 if QUICK else 8000, line, pss)
    finally:
        world.close()


def main() -> None:
    # As an installation has it: with compiled modules. Compiling them at each start doubles its time and memory.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "src"], check=True)
    with tempfile.TemporaryDirectory(prefix="botlease-bench-") as name:
        folder = Path(name)
        start = floor_child_start(folder)
        python = timed([sys.executable, "-c", "pass"])
        floors = {"start": median(start), "python": median(python)}
        print("Floors of this run")
        line("start of the bot (python -I -S)", ms(start))
        line("python -c pass", ms(python))
        line("an idle Python with asyncio", f"PSS {floor_memory():5.1f} MB")
        gateway(folder)
        if "--gateway" in sys.argv:
            return
        counter = iter(range(1000))
        measure("SQLite", lambda: f"sqlite:///{folder}/bench{next(counter)}.db", folder, floors)
        server = Postgres()
        try:
            server.start()

            def url() -> str:
                database = f"bench{next(counter)}"
                operator(server.url())(f"CREATE DATABASE {database}")
                return server.url(database)

            measure("PostgreSQL", url, folder, floors)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
