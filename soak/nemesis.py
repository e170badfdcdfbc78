"""Faults on real processes: real supervisors and bots, real databases, a witness as the judge."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from cgroups import has_cgroups
from harness import BOTLEASE, clean_env
from netns import has_netns, has_pid_namespaces
from servers import libfaketime

from botlease import clock
from soak import ROOT
from soak.agreement import differences
from soak.deployments import GRACE, WORLDS, World, sweep
from soak.faults import KINDS, Scene, possible
from soak.oracle import Oracle, now
from soak.report import Report

FAULTS_EACH = 60
AT_ONCE = 5
MARGIN = 0.99
"""Where the end of a lease was waited out: for so much of the lock-delay (whose clock may be fast) nobody has worked
before another begins. Beside it there is the kill budget, with the clock rates 0.28 s at a ttl of 1.5 and 1.2 s at the
default of 10; but that is there for a busy machine to use up (with seven worlds, tests and a model checker on two cores
0.028 of the 0.28 were left once)."""
VERIFIED_EVERY = 10


def bound(ttl: float) -> float:
    """Seconds from the end of the last fault to somebody at work. The simulation's own bound (docs/design.md), the
    restart of a bot that crashed, of a platform, and of Pythons on two cores that are busy otherwise."""
    return 5.5 * ttl * 1.01 + 1 + 2 * GRACE + 1 + 4


class Run:
    """One world, from its first deployment to its last."""

    def __init__(self, seed: int, kind: str, faults: int, only: Iterable[str], plant: str, folder: Path) -> None:
        store, _, extra = kind.partition("-")
        self.world = World(seed, store, folder, fake_time=extra == "clocks", plant=plant)
        self.kind = kind
        self.oracle = Oracle(self.world.witness)
        self.rng = random.Random(f"{seed}-faults")
        self.quota = faults
        self.only = sorted(only)
        self.tried: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.findings: list[str] = []
        self.slowest = 0.0
        self.verified = 0
        self.agreed = 0
        self.explained = 0
        self.margins: dict[str, float] = {}
        self.damaged = False

    async def go(self) -> None:
        if not self.kinds():
            self.findings.append(f"on this machine such a world has no {' and no '.join(self.only)}")
            return
        try:
            await self.world.open(3)
            await self.works(now(), "the start")
            while sum(self.faults.values()) < self.quota and not self.broken() and not self.damaged:
                self.say({"faults": await self.one()})
            if not self.broken() and not self.damaged:
                await self.works(now(), "the end")
                await self.stays()
            if not self.damaged:
                await self.verify()
        except Exception as e:
            self.findings.append(f"the nemesis itself: {type(e).__name__}: {e}")
            raise

    def say(self, line: dict[str, object]) -> None:
        """To whoever started this world; who may be gone."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(line), flush=True)

    def broken(self) -> bool:
        return bool(self.findings or self.oracle.findings)

    def kinds(self) -> list[str]:
        return [kind for kind in possible(self.world) if not self.only or kind in self.only]

    def choose(self) -> str:
        """Every kind comes up; what came up least, more often."""
        kinds = self.kinds()
        least = min(self.tried[k] for k in kinds)
        return self.rng.choice([k for k in kinds if self.tried[k] == least] if self.rng.random() < 0.6 else kinds)

    async def one(self) -> int:
        """Mostly one fault; how many it was that there was somebody, or something, to do them to."""
        names = [self.choose()]
        if self.rng.random() < 0.25:
            # two faults of the database would wait for each other, and a lost tail may hold an operator's last word
            other = self.choose()
            words = [set(n.split("_")) for n in (names[0], other)]
            data = [bool(w & {"database", "databases", "fail", "file", "operator", "tables"}) for w in words]
            if not all(data):
                names.append(other)
        self.tried.update(names)
        self.world.tell(f"fault {' and '.join(names)}")
        scene = Scene(self.world, self.oracle, self.rng)
        done = await asyncio.gather(*(KINDS[name][0](scene) for name in names))
        names = [name for name, did in zip(names, done, strict=True) if did is not False]
        self.faults.update(names)
        ended = now()
        self.world.tell("undone")
        if self.rng.random() < 0.8:
            await self.works(ended, " and ".join(names))
        self.oracle.read()
        for harm in self.world.harms:
            if harm.last < 0:
                harm.last = self.oracle.highest
        if sum(self.faults.values()) // VERIFIED_EVERY > self.verified:
            await self.stays()
            await self.verify()
        await self.keep_enough()
        return len(names)

    async def keep_enough(self) -> None:
        """Three deployments, each of which could work."""
        while len(self.world.deployments) > 4:
            await self.world.deployments[0].retire()
        while len(self.world.deployments) < 3:
            self.world.deploy(self.rng.choice(self.world.hosts), f"v{self.world.count}")

    async def works(self, since: float, after: str) -> None:
        """Somebody is at work again, and stays so for a moment, within the bound."""
        limit = bound(self.world.ttl)
        while True:
            self.oracle.read()
            if self.oracle.last > since and now() - self.oracle.last < 0.3:
                break
            if now() - since > limit:
                self.damaged = self.is_damaged()
                if self.damaged:
                    return  # nobody may work on that, and every instance says so
                self.findings.append(f"nobody at work {limit:.1f} s after {after}")
                scene = Scene(self.world, self.oracle, self.rng)
                for table in ("bot_instances", "bot_leases", "bot_deployments", "bot_terms ORDER BY term DESC LIMIT 5"):
                    for row in await scene.sql(f"SELECT * FROM {table}"):
                        self.world.tell(f"{table.split()[0]}: {row}")
                return
            await asyncio.sleep(0.05)
        self.slowest = max(self.slowest, (now() - since) / limit)

    async def stays(self) -> None:
        """The same one works for two ttl, within the bound. Whoever drains, and leaves the lease to nobody, works as
        well; and what the next fault does to everybody would mend it, and hide it."""
        began = since = now()
        which, limit = None, bound(self.world.ttl) + 2 * self.world.ttl
        while now() - since < 2 * self.world.ttl and not self.broken():
            await asyncio.sleep(0.05)
            self.oracle.read()
            if self.oracle.latest is not which or now() - self.oracle.last > 0.5:
                which, since = self.oracle.latest, now()
            if now() - began > limit:
                self.damaged = self.is_damaged()
                if not self.damaged:
                    self.findings.append(f"nobody stayed at work, {limit:.1f} s after the last fault")
                return

    def is_damaged(self) -> bool:
        """Faults that move the file of SQLite under a journal can roll it into another one: its own documentation."""
        if self.world.store != "sqlite" or not any(h.kind in ("lost", "emptied") for h in self.world.harms):
            return False
        with contextlib.closing(sqlite3.connect(f"file:{self.world.file}?mode=ro", uri=True)) as db:
            try:
                return bool(db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok")
            except sqlite3.DatabaseError as e:
                return "malformed" in str(e)

    async def botlease(self, *args: str) -> tuple[int, list[Any]]:
        """What one of its commands says, line by line."""
        done = await asyncio.create_subprocess_exec(
            *(*BOTLEASE, *args, "--json"),
            env=clean_env(BOTLEASE_DATABASE_URL=self.world.direct),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await done.communicate()
        self.world.tell(f"{args}: {done.returncode} {err.decode()}")
        return done.returncode or 0, [json.loads(line) for line in out.decode().splitlines()]

    async def verify(self) -> None:
        """The journal must say what the witness says, and the witness what the journal says."""
        self.verified += 1
        self.oracle.read()  # before the journal is, which has a term before its work begins
        for _ in range(5):
            code, rows = await self.botlease("history", "--limit", "100000")
            verdict, verdicts = await self.botlease("verify")
            if code == 0 and verdict in (0, 1):
                break
            await asyncio.sleep(1)  # what a fault did to the database is not over for everybody yet
        else:
            self.damaged = self.is_damaged()
            if self.damaged:
                return  # they say so, and so does everybody who starts
            self.findings.append(f"neither history nor verify could be asked: {code}, {verdict}")
            return
        waited_out = {row["term"] for row in rows if row["began"] == "expired"}
        terms = sorted({w.term for w in self.oracle.works.values()})

        def harmed(term: int) -> bool:
            """Where rows were lost or edited it is not the row's silence that was waited out (assumptions 6 and 7)."""
            return any(h.kind != "clock" and h.first <= term <= h.end(terms) for h in self.world.harms)

        for work in self.oracle.works.values():
            if work.term not in waited_out or work.margin is None or work.who in self.margins:
                continue
            self.margins[work.who] = work.margin
            if work.margin < MARGIN * self.world.lock_delay and not harmed(work.term):
                self.findings.append(f"work began {work.margin:.3f} s after the one before it, in term {work.term}")
        offset = None if self.world.fake_time else clock.wall() - now()
        said = [finding for verdict in verdicts for finding in verdict["findings"]]
        left, explained = differences(rows, said, self.oracle.works.values(), self.world.harms, offset)
        self.findings += left
        self.agreed += not left and not explained
        self.explained += bool(explained)

    def result(self) -> dict[str, object]:
        o = self.oracle
        return {
            "seed": self.world.seed,
            "kind": self.kind,
            "only": self.only,
            "counts": dict(self.faults),
            "findings": self.findings + o.findings,
            "terms": len({w.term for w in o.works.values()}),
            "stamps": o.stamps,
            "slowest": self.slowest,
            "verified": self.verified,
            "agreed": self.agreed,
            "explained": self.explained,
            "damaged": int(self.damaged),
            "margin": min(self.margins.values(), default=None) if self.world.lock_delay else None,
            "margin without": min(self.margins.values(), default=None) if not self.world.lock_delay else None,
            "waited out": len(self.margins),
            "residue": o.residue,
        }


def main(seed: int, kind: str, faults: int, only: Iterable[str], plant: str) -> int:
    """One world in this process; its result is the last line of the output."""
    with tempfile.TemporaryDirectory(prefix="botlease-nemesis-", ignore_cleanup_errors=True) as folder:
        run = Run(seed, kind, faults, only, plant, Path(folder))
        with contextlib.suppress(asyncio.CancelledError):
            loop = asyncio.new_event_loop()
            task = loop.create_task(run.go())
            _ends_at_a_signal(task)
            try:
                loop.run_until_complete(task)
            finally:
                loop.run_until_complete(run.world.close())
                result = run.result()
                if result["findings"]:
                    result["story"] = run.world.story[-60:]
                    result["logs"] = {p.name: p.read_text()[-3000:] for p in sorted(Path(folder).glob("log-*"))[-6:]}
                run.say({"result": result})
    return 1 if run.broken() else 0


def _ends_at_a_signal(task: asyncio.Task[None]) -> None:
    """At the first one: ``timeout`` and a terminal signal a whole group, some of it twice, and a second one would cut
    the cleaning up short."""
    loop = task.get_loop()

    def end() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)


async def _world(
    seed: int, kind: str, faults: int, only: Iterable[str], plant: str
) -> AsyncIterator[dict[str, object]]:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "soak.nemesis", str(seed), kind, str(faults), ",".join(only), plant),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"},
            stdout=subprocess.PIPE,
            limit=1 << 26,
            start_new_session=True,  # we tell it to end, and not the terminal each of its programs
        )
    )
    try:
        process = await asyncio.shield(starting)
        assert process.stdout is not None
        async for line in process.stdout:
            yield json.loads(line)
        if await process.wait() not in (0, 1):
            yield {"result": {"seed": seed, "kind": kind, "findings": [f"ended with {process.returncode}"]}}
    finally:
        process = await starting
        if process.returncode is None:
            process.terminate()
            await process.wait()


class Log:
    """Results of worlds, a line each, in a file if there is one: a run of hours that was cut off goes on from there,
    with the seeds that it began with."""

    def __init__(self, path: Path | None, first: int) -> None:
        self.path = path
        self.first = first
        self.results: list[dict[str, Any]] = []
        if path and path.exists() and path.stat().st_size:
            # a last line that was cut off is not of a whole world
            head, *lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
            self.first = json.loads(head)["first"]
            self.results = [json.loads(line) for line in lines]
        if path:
            path.write_text("".join(json.dumps(line) + "\n" for line in [{"first": self.first}, *self.results]))

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


async def _all(
    report: Report, log: Log, faults: int, worlds: tuple[str, ...], only: Iterable[str], at_once: int, plant: str
) -> None:
    this = asyncio.current_task()
    assert this is not None
    _ends_at_a_signal(this)
    known = {(r["seed"], r["kind"]) for r in log.results}
    numbers = itertools.count()
    done = sum(sum(r.get("counts", {}).values()) for r in log.results)
    ahead = 0  # that the worlds which are open are still to do

    def next_world() -> tuple[int, str, int] | None:
        """As many as it takes: one whose file was damaged ends early."""
        nonlocal ahead
        quota = min(FAULTS_EACH, faults - done - ahead)
        if quota <= 0 or len(report.failures) > 20:
            return None
        ahead += quota
        seed, kind = next(k for n in numbers if (k := (log.first + n, worlds[n % len(worlds)])) not in known)
        return seed, kind, quota

    async def worker() -> None:
        nonlocal done, ahead
        while world := next_world():
            seed, kind, left = world
            result: Any = {"damaged": 0}
            async for line in _world(seed, kind, left, only, plant):
                some = int(str(line.get("faults", 0)))
                done, ahead, left = done + some, ahead - min(some, left), left - min(some, left)
                report.progress(f"{done:,} of {faults:,} faults")
                if "result" not in line:
                    continue
                result = {"damaged": 0} | line["result"]
                log.add(result)
                _fail(report, result)
                if result["findings"]:
                    print(json.dumps(result, indent=1), file=sys.stderr)
            if result["damaged"]:  # what was to be done to it is done to another one
                ahead -= left

    async with asyncio.TaskGroup() as workers:  # gather would not wait for the worlds of the others when it is ended
        for _ in range(at_once):
            workers.create_task(worker())


def _fail(report: Report, result: dict[str, Any]) -> None:
    seed, kind = result["seed"], result["kind"]
    for text in result["findings"]:
        only = "".join(f" --fault {name}" for name in result.get("only", ()))
        report.fail(f"{kind}: {text}; again: scripts/soak --part nemesis --first {seed} --world {kind}{only}")


def _figures(report: Report, log: Log) -> None:
    results = log.results
    counts = sum((Counter(r.get("counts", {})) for r in results), Counter[str]())
    residue = [stamp for r in results for stamp in r.get("residue", [])]

    def total(name: str) -> str:
        return f"{sum(r.get(name, 0) for r in results):,}"

    def least(name: str) -> str:
        seen = [r[name] for r in results if r.get(name) is not None]
        return f"for {min(seen):.2f} s at least" if seen else "not seen"

    report.figures |= {
        "faults": f"{sum(counts.values()):,}",
        "kinds of faults": str(len(counts)),
        "worlds": f"{len(results)} (from {log.first})",
        "terms": total("terms"),
        "stamps of witnesses": total("stamps"),
        "overlaps": str(sum("OVERLAP" in f for f in report.failures)),
        "slowest recovery": f"{max((r.get('slowest', 0) for r in results), default=0):.0%} of its bound",
        "verify and witness agreed": f"{total('agreed')} of {total('verified')} times",
        "differed by what a fault explains": f"{total('explained')} times",
        "files damaged by what moved them": total("damaged"),
        "leases waited out": total("waited out"),
        "nobody at work before a takeover": least("margin"),
        "without a lock-delay": least("margin without"),
        "work after a thaw": f"{len(residue)} stamps, at most {max(residue, default=0) * 1000:.2f} ms after it",
    }
    for kind, count in counts.most_common():
        report.figures[f"fault: {kind}"] = f"{count:,}"


def run(
    first: int,
    faults: int,
    worlds: tuple[str, ...] = WORLDS,
    only: tuple[str, ...] = (),
    at_once: int = AT_ONCE,
    plant: str = "",
    path: Path | None = None,
) -> Report:
    report = Report("nemesis")
    log = Log(path, first)
    for result in log.results:
        _fail(report, result)
    sweep()
    for what, here in (
        ("network namespaces", has_netns()),
        ("cgroups", has_cgroups()),
        ("process namespaces", has_pid_namespaces()),
        ("clocks that are stepped (libfaketime)", libfaketime() is not None),
    ):
        if not here:
            print(f"  nemesis: here are no {what}: it does without", file=sys.stderr)
    try:
        asyncio.run(_all(report, log, faults, worlds, only, at_once, plant))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    _figures(report, log)
    return report


if __name__ == "__main__":
    seed, kind, faults, only, plant = sys.argv[1:]
    raise SystemExit(main(int(seed), kind, int(faults), only.split(",") if only else (), plant))
