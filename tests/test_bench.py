"""scripts/bench: what it says of figures. The figures themselves are measured, not tested."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import check, floors, page, plot, turns  # noqa: E402 - after its folder
from bench.hosts import MISSING, Hosts  # noqa: E402
from bench.lab import Lab, bench, named  # noqa: E402
from bench.systems import systems  # noqa: E402


def figures(**ours: Any) -> dict[str, Any]:
    row = {
        **{
            "name": "botlease, PostgreSQL",
            "ours": True,
            "server": "postgres",
            "ttl": 10,
            "settings": "",
            "version": "1",
        },
        "handover": {"gap": [0.011, 0.012], "total": [0.02, 0.02], "overlap": 0.0},
        "crash": {"took": [0.02]},
        "elsewhere": {"took": [11.0, 11.1]},
        "supervisor stopped": {"overlap": [0.0], "took over": 1, "still": 0, "runs": 1},
        "idle": {w: {"cpu": 1.0, "pss": 20.0, "requests": 0.5} for w in ("holder", "standby")},
        "start-up": [0.1, 0.11],
    }
    peer = row | {"name": "pg <advisory>", "ours": False, "ttl": 0, "in-process": {"gap": [0.002]}}
    peer |= {"elsewhere": {"took": [], "gone": ["not within 60 s"]}, "start-up": {"failed": "Gone: it ended with 1"}}
    peer |= {"supervisor stopped": {"overlap": [3.0], "took over": 1, "still": 1, "runs": 1}}
    gone = {"name": "consul lock", "ours": False, "missing": "consul is not installed"}
    floors = {
        "start of the child (python -I -S)": [0.01],
        "python -c 'import asyncio'": [0.06],
        "a commit on SQLite": [0.001],
        "flock: to a waiting process": [0.0001],
        "true": [0.001],
        "PostgreSQL: an advisory lock, let go here and had there": [0.0005],
        "PostgreSQL: a durable commit": [0.001],
    }
    idle = {name: {"cpu": 0.5, "pss": 15.0} for name in ("PostgreSQL (asyncpg)", "SQLite")}
    found = {"floors": floors, "idle floor": idle, "versions": {"PostgreSQL": "15"}}
    found["turns"] = {turns.ALONE: [0.01], "botlease, PostgreSQL": [0.015], "pg <advisory>": [0.015, 0.016]}
    return found | {"peers": [row | ours, peer, gone]}


def test_figures_within_their_bounds_break_nothing_and_each_that_is_beyond_is_named() -> None:
    assert check.broken(figures()) == []
    slow = figures(handover={"gap": [0.5], "total": [0.5], "overlap": 0.1})
    assert [line.split(":")[1] for line in check.broken(slow)] == [
        " planned gap",
        " overlap",
        " planned gap, p99",
    ]
    two = figures(**{"supervisor stopped": {"overlap": [0.001], "took over": 1, "still": 0, "runs": 1}})
    assert "overlap, supervisor stopped" in check.broken(two)[0]
    fat = figures(idle={w: {"cpu": 1.0, "pss": 27.0, "requests": 0.5} for w in ("holder", "standby")})
    assert len(check.broken(fat)) == 2
    busy = figures(idle={w: {"cpu": 2.6, "pss": 20.0, "requests": 0.5} for w in ("holder", "standby")})
    assert [line.split(":")[1] for line in check.broken(busy)] == [" CPU of the holder", " CPU of the standby"]
    late = figures(elsewhere={"took": [11.0, 12.0]})
    assert [line.split(":")[1] for line in check.broken(late)] == [" another host is gone"]
    assert check.broken(figures(handover={"gap": [0.02], "total": [0.02], "overlap": 0.0})) != []
    slower = {"start of the child": [0.02]}  # the machine of that hour
    assert check.broken(figures(handover={"gap": [0.02], "total": [0.02], "overlap": 0.0}, **slower)) == []
    other = {"name": "botlease, any program, PostgreSQL", "handover": {"gap": [0.02], "total": [0.02], "overlap": 0.0}}
    assert check.broken(figures(**other)) == []  # all of its start is in it
    fleet = {"same host": {"again": 12.2, "bound": 12.1, "moved": 1, "overlap": 0.0}}
    assert [line.split(":")[1] for line in check.broken(figures() | {"fleet": fleet})] == [
        " active again, same host",
        " moved, same host",
    ]
    full = {check.MOST: {"rate": 1000.0}, check.FLOOR: {"rate": 9000.0}}
    assert "a renewal on a full server" in check.broken(figures() | {"capacity": full})[0]


def test_what_of_ours_could_not_be_measured_breaks_the_check() -> None:
    assert check.broken({"floors": figures()["floors"]}) == ["botlease: nothing of ours was measured"]
    assert "Gone: why" in check.broken(figures(crash={"failed": "Gone: why"}))[0]
    assert "not within 60 s" in check.broken(figures(elsewhere={"took": [11.0], "gone": ["not within 60 s"]}))[0]
    late = figures(**{"connection cut": {"overlap": [0.0], "took over": 0, "still": 0, "runs": 1}})
    assert "taken over in 0 of 1 runs" in check.broken(late)[0]
    assert check.broken(figures() | {"fleet": {"failed": "why"}}) == ["fleet: why"]
    stopped = figures(**{"supervisor stopped": {"overlap": [0.0], "took over": 0, "still": 0, "runs": 1}})
    assert "supervisor stopped: taken over in 0 of 1 runs" in check.broken(stopped)[0]


def test_what_of_ours_is_not_there_at_all_breaks_the_check_as_well() -> None:
    ours = [s for s in systems() if s.name in ("botlease, PostgreSQL", "botlease, warm, SQLite")]
    assert check.broken(figures(), ("peers", "fleet"), ours) == [
        "botlease, PostgreSQL: child: was not measured",
        "botlease, PostgreSQL: kill -9 of the supervisor: was not measured",
        "botlease, PostgreSQL: connection cut: was not measured",
        "botlease, warm, SQLite: handover: was not measured",
        "fleet: was not measured",
    ]


def test_what_takes_a_second_now_and_then_breaks_the_check_though_its_median_is_good() -> None:
    gaps = [0.011] * 98 + [1.0, 1.0]
    (line,) = check.broken(figures(handover={"gap": gaps, "total": gaps, "overlap": 0.0}))
    assert "planned gap, p99" in line


@pytest.mark.parametrize(("user", "breaks"), [(0, 1), (1000, 0)])
def test_only_root_is_asked_for_hosts_that_vanish(monkeypatch: pytest.MonkeyPatch, user: int, breaks: int) -> None:
    monkeypatch.setattr(check.os, "geteuid", lambda: user)
    assert len(check.broken(figures(elsewhere={"failed": f"Gone: {MISSING}: why"}))) == breaks


def test_the_goals_say_which_are_met() -> None:
    goals = {g.what: g for g in check.goals(figures())}
    planned = next(g for what, g in goals.items() if what.startswith("planned gap with a child, PostgreSQL"))
    assert "pg <advisory>" in planned.what and planned.met and abs(planned.most - 15.5) < 1e-9
    assert goals["another host is gone, worst, botlease, PostgreSQL"].met
    assert goals["start-up, more than that of true, botlease, PostgreSQL"].met
    late = figures(elsewhere={"took": [11.0, 11.4]})
    assert _missed(late) == ["another host is gone, worst, botlease, PostgreSQL"]


def test_the_planned_gap_is_judged_by_what_was_measured_in_turn() -> None:
    found = figures()
    found["peers"][0]["handover"]["gap"] = [0.020]  # in another hour
    assert _missed(found) == []
    found["turns"]["pg <advisory>"] = [0.014]
    assert _missed(found) == [
        "planned gap with a child, PostgreSQL, beside the fastest peer's (pg <advisory>), in turn"
    ]


def test_in_turn_are_ours_and_whoever_comes_near_the_fastest_peer_on_a_server() -> None:
    rows = figures()["peers"]
    slow = rows[1] | {"name": "slow", "handover": {"gap": [0.030]}}
    flock = rows[1] | {"name": "flock", "server": "file", "handover": {"gap": [0.002]}}
    ours = rows[0] | {"handover": {"gap": [0.050]}}
    assert turns.near([ours, *rows[1:], slow, flock]) == ["botlease, PostgreSQL", "pg <advisory>", "flock"]


def _missed(found: dict[str, Any]) -> list[str]:
    return [g.what for g in check.goals(found) if g.found is not None and not g.met]


def test_a_goal_without_a_figure_is_named_and_not_met() -> None:
    goals = {g.what: g for g in check.goals(figures())}
    assert goals["statements of a holder"].found is None and not goals["statements of a holder"].met
    assert page._judged(goals["statements of a holder"]) == ("–", "not measured")


def test_what_was_not_seen_to_end_is_no_figure_that_is_left_out() -> None:
    never = figures(elsewhere={"took": [11.0], "gone": ["not within 60 s"]})
    assert _missed(never) == ["another host is gone, worst, botlease, PostgreSQL"]
    goal = next(g for g in check.goals(never) if g.what == _missed(never)[0])
    assert page._judged(goal) == ("never", "**missed**")


def test_of_less_than_a_hundred_the_p99_is_the_largest() -> None:
    assert floors.p99([float(n) for n in range(1, 31)]) == 30
    assert floors.p99([float(n) for n in range(1, 101)]) == 99
    assert floors.p99([float(n) for n in range(1, 201)]) == 198


def test_a_slow_machine_breaks_no_bound() -> None:
    found = figures()
    slow = figures(handover={"gap": [0.06], "total": [0.1], "overlap": 0.0}, crash={"took": [0.1]})
    slow["peers"][0]["start-up"] = [0.5]
    slow["floors"] = {name: [v * 5 for v in values] for name, values in found["floors"].items()}
    assert check.broken(slow) == []


def test_the_page_names_what_was_not_measured_and_what_overlapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PLOTS", tmp_path / "docs" / "benchmarks")
    text = page.write(figures()).read_text()

    assert "not measured: consul lock: consul is not installed" in text
    assert "| pg <advisory> | – | **never ended** (3.0 s and more were watched) | – |" in text
    assert "| planned handover of a program, ms | 11.5 | – | 11.5 (pg <advisory>) | – | 10.0 |" in text
    assert "| **botlease, PostgreSQL** | 11.5 / 12.0 / 12.0 (of 2) |" in text
    assert "| floor: a row each 2 s, SQLite | 0.50 | 15.0 |" in text
    assert "| not within 60 s: 1 of 1 |" in text and "Gone: it ended with 1" in text
    for drawing in (tmp_path / "docs" / "benchmarks").glob("*.svg"):
        assert f"benchmarks/{drawing.name}" in text
        ElementTree.fromstring(drawing.read_text())


def test_nothing_that_a_system_left_behind_is_there_for_the_next_one(tmp_path: Path) -> None:
    """Fifty children that nobody had ended took most of a core from all that was measured later."""
    system = next(s for s in systems() if s.name == "flock -o")  # its child outlives it
    with bench(Lab(tmp_path, {}, {}, {}, Hosts()), system) as b:
        holder = b.start()
        b.works(1, 10)
        b.start()
        b.kill_alone(holder)
        b.works(2, 10)
        assert len(named(str(b.track.path).encode())) >= 3
    assert named(str(b.track.path).encode()) == []


def test_a_plot_reaches_from_the_median_to_the_far_end_and_is_drawn_for_any_figures() -> None:
    for rows in (
        [("a", 0.02, 0.0, plot.OURS)],
        [("a", 90.0, 0.0, plot.OURS)],
        [("a", 1.0, 1.0, plot.THEIRS), ("b", 12_345.0, 99_999.0, plot.FLOOR)],
    ):
        drawing = ElementTree.fromstring(plot.bars("t", "ms", rows))
        assert len(drawing.findall("{*}rect")) == len(rows)
        drawing = ElementTree.fromstring(plot.dots("t", "ms", rows))
        assert len(drawing.findall("{*}circle[@r='5']")) == len(rows)


def test_every_peer_of_the_issue_is_compared_or_named() -> None:
    names = " ".join(s.name for s in systems())
    for peer in (
        *("flock", "filelock", "etcdctl", "consul", "tooz-pg", "tooz-etcd", "tooz-redis", "kazoo", "redis-py"),
        *("python-redis-lock", "sqlalchemy-dlock", "pals", "dislock", "mithril", "single-beat", "notifelect", "seed"),
    ):
        assert peer in names


@pytest.mark.parametrize(
    ("text", "why"),
    [("not figures", "is not a file of figures"), ('{"quick": true, "floors": {}}', "is of a run with --quick")],
)
def test_a_run_goes_on_only_from_figures_of_its_own_kind(tmp_path: Path, text: str, why: str) -> None:
    from click.testing import CliRunner

    from bench.__main__ import main

    path = tmp_path / "figures.json"
    path.write_text(text)
    done = CliRunner().invoke(main, ["--json", str(path)])
    assert done.exit_code == 2 and why in done.output
    assert path.read_text() == text
