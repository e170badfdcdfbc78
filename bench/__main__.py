"""``scripts/bench``: this project and what a user would take instead, side by side in one run."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from harness import World

from bench import ROOT, capacity, check, compare, fleet, floors, own, page, turns
from bench.counted import nobody
from bench.gateway import measure as measure_gateway
from bench.lab import laboratory
from bench.systems import CHILD, systems
from botlease import clock

PARTS = ("peers", "turns", "own", "gateway", "fleet", "capacity")


def say(text: str) -> None:
    click.echo(f"  {text}", err=True)


@click.command()
@click.option("--quick", is_flag=True, help="Few samples: to see that it runs.")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Only this part; may be repeated.")
@click.option("--system", "chosen", multiple=True, metavar="NAME", help="Only the systems whose name has this in it.")
@click.option("--check", "checking", is_flag=True, help="Against the bounds of bench/check.py; 1 if one is broken.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Keep all figures there, and go on from there.")
@click.option("--write", is_flag=True, help="Write docs/benchmarks.md, which a whole run does by itself.")
def main(
    quick: bool, parts: tuple[str, ...], chosen: tuple[str, ...], checking: bool, path: str | None, write: bool
) -> None:
    """Measure handover, crash, overlap, memory, idle cost and start-up of botlease and of its peers; what many bots
    cost; how many leases a PostgreSQL server carries. Each figure stands beside its floor of the same run.

    A whole run takes some four hours, and wants the machine for itself. It writes docs/benchmarks.md. With --json it
    may be cut off: what is there is not measured again, only the floors are measured once more, and count together.

    \b
    scripts/bench --check                       an hour: our own figures against their bounds
    scripts/bench --only peers --system etcd    one peer
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped, as after Ctrl-C
    if checking and not parts:
        parts, chosen = ("peers", "own", "fleet", "capacity"), ("botlease",)
    # As an installation has it: with compiled modules. Compiling them at each start doubles its time and memory.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "src"], check=True, cwd=ROOT)
    todo = [part for part in PARTS if not parts or part in parts]
    found: dict[str, Any] = {"quick": quick, "floors": {}}
    if path and Path(path).exists():
        try:
            found = json.loads(Path(path).read_text())
            same = found["quick"] is quick
        except (ValueError, KeyError, TypeError):
            raise click.UsageError(f"{path} is not a file of figures: name another one") from None
        if not same:
            raise click.UsageError(f"{path} is of a run {'without' if quick else 'with'} --quick: name another one")

    def keep(**more: object) -> None:
        if path:
            new = Path(f"{path}.new")
            new.write_text(json.dumps(found | more))
            new.replace(path)  # cut off in between, the old figures are still whole

    if checking and (of := found.get("versions", {}).get("botlease", _commit())) != _commit():
        raise click.UsageError(f"{path} is of {of}, and --check is for what is here: name another one")
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release().split('-')[0]}"
    today = f"{datetime.fromtimestamp(clock.wall(), UTC):%d %B %Y}"
    for key, what in (("machines", machine), ("days", today)):
        if what not in found.setdefault(key, []):
            found[key].append(what)

    with laboratory(say) as lab, tempfile.TemporaryDirectory(prefix="botlease-bench-") as name:
        folder = Path(name)
        commits = {*found.get("versions", {}).get("botlease", "").split(" and "), _commit()} - {""}
        found["versions"] = lab.versions | {"botlease": " and ".join(sorted(commits))}
        postgres = lab.servers["postgres"]
        n = 10 if quick else 30
        known_floors = floors.measure(CHILD, folder, n) | asyncio.run(floors.postgres(postgres.url(), n))
        for what, values in known_floors.items():
            found["floors"][what] = found["floors"].get(what, []) + values
            say(f"floor: {what}: {floors.ms(values)}")
        if "nobody" not in found:
            found["nobody"] = nobody(postgres.url(), 10 if quick else 30)
        if "idle floor" not in found:
            found["idle floor"] = floors.idle(postgres.url(), folder, 10 if quick else 60)
        measures: dict[str, Callable[[], Any]] = {
            "peers": lambda: compare.measure(
                lab, [*chosen], say, lambda rows: keep(peers=rows), found.get("peers", []), _commit(), quick=quick
            ),
            "turns": lambda: turns.measure(lab, found.get("peers", []), say, quick=quick),
            "own": lambda: own.measure(folder, postgres, say, quick=quick),
            "gateway": lambda: _gateway(folder, quick=quick),
            "fleet": lambda: fleet.measure(folder, postgres, say, quick=quick),
            "capacity": lambda: capacity.measure(postgres, say, quick=quick),
        }
        for part in todo:
            if part in found and part != "peers" and "failed" not in found[part]:
                continue
            try:
                found[part] = measures[part]()
            except Exception as e:  # the rest of hours of figures is not to be lost with it
                if part == "peers":  # each of its own jobs is guarded: this machine is out of something
                    raise
                found[part] = {"failed": f"{type(e).__name__}: {e}"}
                say(f"{part}: failed: {e}")
            keep()
    if write or (len(todo) == len(PARTS) and not chosen and not quick):
        click.echo(f"written: {page.write(found).relative_to(ROOT)}")
    if checking:
        ours = [s for s in systems() if s.ours and (not chosen or any(c in s.name for c in chosen))]
        broken = check.broken(found, todo, ours)
        for line in broken:
            click.echo(f"broken: {line}")
        click.echo("bench: FAILED" if broken else "bench: ok")
        raise SystemExit(1 if broken else 0)


def _commit() -> str:
    """Of what is measured; with a + where it was changed since."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "?"
    except OSError:
        return "?"


def _gateway(folder: Path, *, quick: bool) -> list[str]:
    lines: list[str] = []

    def line(label: str, text: str) -> None:
        lines.append(f"{label.strip()}: {text.strip()}")
        say(lines[-1])

    world = World(folder, f"sqlite:///{folder}/gateway.db")
    try:
        measure_gateway(world, 2000 if quick else 8000, line, floors.pss)
    finally:
        world.close()
    return lines


if __name__ == "__main__":
    main(prog_name="scripts/bench")
