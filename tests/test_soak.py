"""scripts/soak itself: it says ok only of what is, and its findings can be told again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness import until
from netns import free_subnet, has_netns
from planted_bugs import BUGS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from soak import deployments, nemesis, oracle, simulation, stores  # noqa: E402 - after its folder
from soak.agreement import Harm, differences  # noqa: E402
from soak.faults import Scene  # noqa: E402
from soak.oracle import Oracle  # noqa: E402
from soak.report import Report  # noqa: E402
from soak.simulation import Sum, replay, run_seed  # noqa: E402


def soak(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "soak", *args], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_it_runs_as_many_seeds_as_were_asked_for_and_counts_their_faults() -> None:
    done = soak("--part", "simulation", "--first", "7", "--seeds", "150")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulation: ok: seeds 150 (from 7), faults ") and "findings 0" in done.stdout


def test_on_a_machine_that_is_too_slow_it_stops_in_time_says_so_and_ends() -> None:
    code = "from soak.simulation import run; run(0, 100_000, 2, minutes=0.01).close()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert done.returncode == 0, done.stderr
    assert "stopped after 0.01 minutes of 100,000 seeds" in done.stdout


def test_a_finding_names_its_seed_and_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    total, seed = Sum(), 0
    with BUGS["release_before_reap"]():
        while not total.failures:
            run_seed(seed, total)
            seed += 1
        (found, text) = total.failures[0]
        assert found == seed - 1 and total.seeds == seed
        assert replay(found) == 1 and text in capsys.readouterr().out
    assert replay(found) == 0 and "nothing broken" in capsys.readouterr().out


@pytest.mark.parametrize("args", [("--seeds", "0"), ("--workers", "0"), ("--part", "nothing"), ("replay",)])
def test_bad_input_is_refused(args: tuple[str, ...]) -> None:
    done = soak(*args)
    assert done.returncode == 2 and "Error" in done.stderr


def judged(*stamps: tuple[str, int, float], thaws: tuple[float, ...] = ()) -> oracle.Oracle:
    judge = oracle.Oracle(Path("/nowhere"))
    judge.thaws += thaws
    for stamp in stamps:
        judge.take(*stamp)
    return judge


def test_the_judge_sees_two_at_work_in_whichever_order_they_wrote() -> None:
    for stamps in ([("a/1", 1, 1.0), ("b/2", 2, 1.1), ("a/1", 1, 1.2)], [("a/1", 1, 1.2), ("b/2", 2, 1.1)]):
        assert any("OVERLAP of a/1" in f for f in judged(*stamps).findings)
    assert judged(("a/1", 1, 1.0), ("b/2", 2, 1.1), ("b/2", 2, 1.2)).findings == []


def test_only_the_first_work_of_a_term_had_somebody_to_wait_for() -> None:
    works = judged(("a/1", 1, 1.0), ("b/1", 2, 3.0), ("b/2", 2, 3.01)).works
    assert [w.margin for w in works.values()] == [None, 2.0, None]


def test_the_judge_sees_a_term_that_is_used_twice_or_falls() -> None:
    assert "used twice" in judged(("a/1", 1, 1.0), ("b/2", 1, 1.1)).findings[0]
    assert "after term 2" in judged(("a/1", 2, 1.0), ("b/2", 1, 1.1)).findings[0]


def test_a_line_that_a_dying_witness_has_not_finished_is_no_stamp(tmp_path: Path) -> None:
    stamps = tmp_path / "witness.txt"
    stamps.write_text("bot-a/1 1 1.000000\nbot-a/1 1 1.0bot-b/2 2 2.000000\nbot-b/2bot-b/2 2 2.100000\nbot-b/2 2 2.2")
    judge = oracle.Oracle(stamps)
    judge.read()
    assert judge.findings == [] and judge.last == 2.1
    assert [(w.who, w.first, w.last) for w in judge.works.values()] == [
        ("bot-a/1/1", 1.0, 1.0),
        ("bot-b/2/2", 2.0, 2.1),
    ]


def test_after_a_thaw_the_judge_forgives_milliseconds_and_counts_them() -> None:
    stamps = ("a/1", 1, 1.0), ("b/2", 2, 3.0), ("a/1", 1, 4.001)
    judge = judged(*stamps, thaws=(4.0,))
    assert judge.findings == [] and judge.residue == [pytest.approx(0.001)]
    assert judged(*stamps, thaws=(3.97,)).findings != []


def test_a_short_run_of_the_nemesis_finds_nothing_counts_what_it_did_and_goes_on_when_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--part", "nemesis", "--world", "sqlite", "--log", str(log))
    done = soak(*options, "--first", "1", "--faults", "5")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "overlaps 0" in done.stdout and "fault: " in done.stdout

    kept = log.read_text()
    log.write_text(kept + '{"seed": 2, "kind": "sql')
    again = soak(*options, "--first", "99", "--faults", "5")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.rpartition("took")[0] == done.stdout.rpartition("took")[0]
    assert log.read_text() == kept


def row(term: int, who: str, begun: float, ended: float | None, how: str = "released") -> dict[str, object]:
    begin, end = (t and datetime.fromtimestamp(t, UTC).replace(tzinfo=None).isoformat(" ") for t in (begun, ended))
    return {"term": term, "instance_id": who, "from": begin, "until": end, "began": how, "ended": "stopped"}


ROWS = [row(n, f"bot-{n}", 1000.0 + 10 * n, 1009.0 + 10 * n) for n in range(1, 8)]
WORKS = [oracle.Work(f"bot-{n}/7/{n}", n, 10.0 * n, 10.0 * n + 8, before_thaws=10.0 * n + 8) for n in range(1, 8)]


def test_the_journal_must_have_each_work_of_the_witnesses_with_its_instance_and_its_times() -> None:
    assert differences(ROWS, [], WORKS, [], 1001.0) == ([], 0)
    assert differences(ROWS, [], WORKS, [], None) == ([], 0)
    assert "no term 3" in differences(ROWS[:2] + ROWS[3:], [], WORKS, [], None)[0][0]
    other = [ROWS[0] | {"instance_id": "bot-9"}, *ROWS[1:]]
    assert "gives term 1 of bot-1/7/1 to bot-9" in differences(other, [], WORKS, [], None)[0][0]
    assert all("before its term began" in f for f in differences(ROWS, [], WORKS, [], 999.0)[0])
    late = differences(ROWS, [], WORKS, [], 1002.0)[0]
    assert len(late) == 7 and all("after its term had ended" in f for f in late)
    assert differences([r | {"ended": "expired"} for r in ROWS], [], WORKS, [], 1002.0) == ([], 0)


@pytest.mark.parametrize("kind", ["clock", "edited", "lost"])
def test_a_fault_explains_only_what_it_can_have_done_to_the_terms_that_it_touched(kind: str) -> None:
    harms = [Harm(kind, 3, 4)]
    what = {"clock": "ended 1 s before it began", "edited": "has no lease beside it", "lost": "has no end"}[kind]
    for term in range(1, 8):
        left, explained = differences(ROWS, [{"term": term, "what": what}], WORKS, harms, 1001.0)
        assert (len(left), explained) == ((0, 1) if term in (3, 4, 5, 6) else (1, 0)), term
    between = [{"term": 5, "what": "OVERLAPS term 4 by 3 s"}], [{"term": 2, "what": "OVERLAPS term 1 by 3 s"}]
    assert [len(differences(ROWS, said, WORKS, harms, 1001.0)[0]) for said in between] == [int(kind != "clock"), 1]


def test_worlds_that_are_open_at_once_have_addresses_of_their_own() -> None:
    """Two whose process numbers were alike got each other's packets, and no database answered."""
    (first, one), (second, two) = free_subnet(), free_subnet()
    with one, two:
        assert first != second


@pytest.mark.skipif(not has_netns(), reason="needs network namespaces")
def test_what_a_world_that_was_killed_left_behind_is_swept_away_and_nothing_else() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, ours = f"botlease-{dead.pid}-7", f"botlease-{os.getpid()}-7"

    def there() -> set[str]:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return {line.split()[0] for line in listed.splitlines()} & {left, ours}

    try:
        for name in (left, ours):
            subprocess.run(["ip", "netns", "add", name], check=True)
        deployments.sweep()
        assert there() == {ours}
    finally:
        for name in there():
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.parametrize(
    ("options", "word", "many"),
    [(("--world=postgres",), "", 11), (("--world=sqlite", "--fault=lock_the_file"), "BEGIN EXCLUSIVE", 1)],
)
def test_an_interrupted_nemesis_leaves_nothing_running(options: tuple[str, ...], word: str, many: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # PostgreSQL is another user for root

        def running() -> list[str]:
            found = []
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has just ended
                    found.append((process / "cmdline").read_text())
            return [command for command in found if folder in command]

        soak = subprocess.Popen(
            [sys.executable, "-m", "soak", "--part=nemesis", "--first=0", *options],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: sum(word in command for command in running()) >= many, 60)
            soak.send_signal(signal.SIGINT)  # as timeout(1) does it: its child, then the group
            os.killpg(soak.pid, signal.SIGINT)
            assert soak.wait(60) == 1
            assert [command for command in running() if not command.startswith("rm\0")] == []
        finally:
            soak.kill()


def test_a_fault_for_whoever_is_at_work_is_not_done_to_one_that_waits(tmp_path: Path) -> None:
    async def look(inside: bool) -> None:
        world = deployments.World(0, "sqlite", tmp_path / str(inside), ttl=10)
        scene = Scene(world, Oracle(world.witness), world.rng)
        try:
            await world.open(0)
            first, second = (world.deploy(deployments.Host(n, 0, None), "v0", inside=inside) for n in range(2))
            while not (working := [d for d in (first, second) if scene.works(d)]):
                scene.oracle.read()
                await asyncio.sleep(0.01)
            other = second if working == [first] else first
            while not inside and "standby" not in other.log.read_text():
                await asyncio.sleep(0.01)
            who = max(scene.oracle.works.values(), key=lambda w: w.last).who
            assert not scene.works(other)
            assert int(who.split("/")[1]) in working[0].tree()
        finally:
            await world.close()

    for inside in (False, True):
        (tmp_path / str(inside)).mkdir()
        asyncio.run(asyncio.wait_for(look(inside), 30))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_nemesis_finds_work_that_goes_on_when_its_trust_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    # A holder that is stopped for longer than its lease shows it: every fourth of these (mostly it is the holder; two
    # of six lengths). With every kind it took up to a hundred faults and more, and once five minutes.
    report = nemesis.run(4, 60, ("postgres",), only=("stop_supervisor",), at_once=1, plant="long_trust")
    assert any("OVERLAP" in f for f in report.failures), report.failures


@pytest.mark.parametrize("guard", ["beat = :beat AND ", "holder IS NULL AND proof = '' AND "])
def test_the_machines_over_the_stores_find_a_guard_that_is_missing(monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    from botlease.stores import sqlitefile

    assert stores.main("sqlite", 4, 1) == 0
    assert guard in sqlitefile.ACQUIRE
    monkeypatch.setattr(sqlitefile, "ACQUIRE", sqlitefile.ACQUIRE.replace(guard, ""))
    with pytest.raises(AssertionError):
        stores.main("sqlite", 150, 1, shrink=False)


def test_the_page_of_hazards_has_all_of_them_and_names_only_what_exists() -> None:
    import re

    from botlease.testing import StoreContract
    from soak.faults import KINDS

    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([A-H]\d+) \|", page, re.M)
    sizes = {"A": 15, "B": 20, "C": 11, "D": 6, "E": 22, "F": 7, "G": 10, "H": 13}
    assert rows == [f"{letter}{n}" for letter, size in sizes.items() for n in range(1, size + 1)]
    for file, name in re.findall(r"`(tests/\w+\.py)::(test_\w+)`", page):
        assert f"def {name}(" in (ROOT / file).read_text(), name
    assert all(hasattr(StoreContract, name) for name in re.findall(r"`StoreContract::(\w+)`", page))
    assert {*re.findall(r"nemesis: `(\w+)`", page)} <= {*KINDS}
    assert {*re.findall(r"planted bug `(\w+)`", page)} <= {*BUGS}
    source = (ROOT / "tests" / "simulation.py").read_text()
    assert [name for name in re.findall(r"simulation: `([^`]+)`", page) if f'"{name}"' not in source] == []


def test_a_run_that_did_next_to_nothing_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("part", {"faults": "1,499"})
    report.enough(1499, "faults")
    assert not report.failures
    report.enough(1500, "faults")
    assert report.failures == ["faults: 1,499 are too few: at least 1,500"]
    capsys.readouterr()

    slow = simulation.run(0, 100_000, 1, minutes=0.001, least=10**6)
    assert "too slow" in slow.failures[0]


def test_a_seed_has_the_same_story_in_a_process_of_its_own_and_after_others(capsys: pytest.CaptureFixture[str]) -> None:
    seeds = (4, 17)
    for seed in range(12):  # whose databases are used again
        run_seed(seed, Sum())
    for seed in seeds:
        assert replay(seed) == 0
        here = capsys.readouterr().out
        assert len(here.splitlines()) > 10 and soak("replay", str(seed)).stdout == here
