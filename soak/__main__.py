"""``scripts/soak``: try to break the promise, for as long as you like. ``--ci`` is what every change must pass."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from soak import ROOT
from soak.deployments import WORLDS
from soak.faults import KINDS
from soak.stores import TARGETS

AT_LEAST_ONE = click.IntRange(min=1)
PARTS = ("nemesis", "stores", "models", "simulation")
CI_FAULTS, CI_KINDS, CI_SIMULATED = 500, 20, 1_000_000
"""What CI must have seen, or it says nothing: of the nemesis faults and kinds of them; faults of the simulation."""
CI_MINUTES = 24
"""For the 100,000 seeds, which take 7 alone (measured on two cores); beside the rest of it, on slow machines, more."""
NICE = {"nemesis": "0", "stores": "3", "models": "5", "simulation": "15"}
"""Real processes are judged by a real clock; the others only need the time that is left."""


@click.group(invoke_without_command=True)
@click.option("--ci", is_flag=True, help="What CI runs: fixed seeds, the models at their small size.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this part; may be repeated.")
@click.option("--seeds", type=AT_LEAST_ONE, help="Seeds of the simulation. By default 2,000,000, with --ci 100,000.")
@click.option("--first", type=click.IntRange(min=0), help="First seed. By default a random one, with --ci 0.")
@click.option("--faults", type=AT_LEAST_ONE, help="Faults of the nemesis. By default 20,000, with --ci 540.")
@click.option("--world", type=click.Choice(WORLDS), help="Only this kind of world of the nemesis.")
@click.option(
    "--fault",
    multiple=True,
    type=click.Choice(sorted(KINDS)),
    metavar="KIND",
    help="Only this kind of fault of the nemesis; may be repeated.",
)
@click.option(
    "--log", type=click.Path(dir_okay=False, writable=True), help="Nemesis: keep it here, and go on from here."
)
@click.option("--machines", type=AT_LEAST_ONE, help="Runs of each store. By default 1,000, with --ci 100.")
@click.option("--store", type=click.Choice(TARGETS), help="Only this store.")
@click.option("--workers", type=AT_LEAST_ONE, default=os.cpu_count() or 2, show_default=True, help="Processes at once.")
@click.pass_context
def main(
    context: click.Context,
    ci: bool,
    parts: tuple[str, ...],
    seeds: int | None,
    first: int | None,
    faults: int | None,
    world: str | None,
    fault: tuple[str, ...],
    log: str | None,
    machines: int | None,
    store: str | None,
    workers: int,
) -> None:
    """Tries to break the promise: faults on real processes (nemesis), random calls on real stores, a model checker,
    and the simulation over many seeds. All parts run at once.

    \b
    scripts/soak --ci                  what every change must pass
    scripts/soak --part simulation     two million seeds that nobody has seen
    scripts/soak --part nemesis        20,000 faults on real deployments; --log FILE, and it may be cut off
    scripts/soak replay 4711           the story of one seed of the simulation

    Ends with 1 if anything was found; each finding names the command that shows it again.
    """
    if context.invoked_subcommand:
        return
    if first is None:
        first = 0 if ci else random.SystemRandom().randrange(10**6, 10**12)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped in order
    if len(parts) != 1:
        options = context.params | {"first": str(first)}
        del options["parts"]
        context.exit(_all([p for p in PARTS if not parts or p in parts], options))
    match parts[0]:
        case "models":
            from soak.models import run as models

            report = models(full=not ci, workers=workers)
        case "nemesis":
            from soak.nemesis import run as nemesis

            report = nemesis(
                first,
                faults or (540 if ci else 20_000),
                (world,) if world else WORLDS,
                fault,
                path=Path(log) if log else None,
            )
            if ci and not faults and not fault:
                report.enough(CI_FAULTS, "faults")
                report.enough(CI_KINDS, "kinds of faults")
        case "stores":
            from soak.stores import run as stores

            report = stores(first, machines or (100 if ci else 1000), workers, (store,) if store else TARGETS)
        case _:
            from soak.simulation import run as simulation

            limit = CI_MINUTES if ci else math.inf
            least = CI_SIMULATED if ci and not seeds else 0
            report = simulation(first, seeds or (100_000 if ci else 2_000_000), workers, limit, least)
    report.close()
    context.exit(1 if report.failures else 0)


def _all(parts: list[str], options: dict[str, object]) -> int:
    """Each part in a process of its own. Their figures come when they end."""
    values = [(n, v) for n, value in options.items() for v in (value if isinstance(value, tuple) else (value,)) if v]
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values]
    running = {
        part: subprocess.Popen(
            ["nice", "-n", NICE[part], sys.executable, "-m", "soak", f"--part={part}", *given], cwd=ROOT
        )
        for part in parts
    }
    began = time.monotonic()
    try:
        failed = [part for part, process in running.items() if process.wait()]
        said = f"FAILED: {', '.join(failed)}" if failed else "ok"
        print(f"soak: {said}, in {time.monotonic() - began:.0f} s", flush=True)
        return 1 if failed else 0
    except KeyboardInterrupt:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in running.values():
            process.wait()
        return 130


@main.command()
@click.argument("seed", type=int)
def replay(seed: int) -> None:
    """Print the story of one seed of the simulation; ends with 1 if it breaks an invariant."""
    from soak.simulation import replay as tell

    raise SystemExit(tell(seed))


if __name__ == "__main__":
    main(prog_name="scripts/soak")
