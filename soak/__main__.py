"""``scripts/soak``: try to break the promise, for as long as you like. ``--ci`` is what every change must pass."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

AT_LEAST_ONE = click.IntRange(min=1)
PARTS = ("models", "simulation")


@click.group(invoke_without_command=True)
@click.option("--ci", is_flag=True, help="What CI runs: fixed seeds, the models at their small size.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this part; may be repeated.")
@click.option("--seeds", type=AT_LEAST_ONE, help="Seeds of the simulation. By default 2,000,000, with --ci 100,000.")
@click.option("--first", type=click.IntRange(min=0), help="First seed. By default a random one, with --ci 0.")
@click.option("--workers", type=AT_LEAST_ONE, default=os.cpu_count() or 2, show_default=True, help="Processes at once.")
@click.pass_context
def main(
    context: click.Context, ci: bool, parts: tuple[str, ...], seeds: int | None, first: int | None, workers: int
) -> None:
    """Tries to break the promise: a model checker, the simulation over many seeds.

    \b
    scripts/soak --ci                  what every change must pass
    scripts/soak --part simulation     two million seeds that nobody has seen
    scripts/soak replay 4711           the story of one seed

    Ends with 1 if anything was found; each finding names the command that shows it again.
    """
    if context.invoked_subcommand:
        return
    if seeds is None:
        seeds = 100_000 if ci else 2_000_000
    if first is None:
        first = 0 if ci else random.SystemRandom().randrange(10**6, 10**12)
    failed = False
    for part in PARTS:
        if parts and part not in parts:
            continue
        if part == "models":
            from soak.models import run as models

            report = models(full=not ci, workers=workers)
        else:
            from soak.simulation import run as simulation

            report = simulation(first, seeds, workers)
        report.close()
        failed = failed or bool(report.failures)
    context.exit(1 if failed else 0)


@main.command()
@click.argument("seed", type=int)
def replay(seed: int) -> None:
    """Print the story of one seed of the simulation; ends with 1 if it breaks an invariant."""
    from soak.simulation import replay as tell

    raise SystemExit(tell(seed))


if __name__ == "__main__":
    main(prog_name="scripts/soak")
