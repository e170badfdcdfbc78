"""Who is newest, over hours of virtual time: the production core and statements, without faults of the network."""

from __future__ import annotations

import random
from contextlib import ExitStack, closing
from typing import Any

import pytest
from simulation import Node, Plan, World

from botlease.model import StopAsked, Timing, Woken

ATTEMPT_OF_A_PLATFORM = (0.5, 2.0, 10.0, 60.0)


class Steady(random.Random):
    """No hint is lost, nothing ends by chance, everybody is quick."""

    def random(self) -> float:
        return 0.5

    def choice(self, seq: Any) -> Any:
        return seq[0]


def quiet(worlds: ExitStack, probation: float = 30.0, **more: object) -> World:
    plan = Plan(
        nodes=0,
        length=0.0,
        timings=[Timing(probation=probation)],
        loss=0.0,
        late=0.0,
        partitions=False,
        crashes=False,
        pauses=False,
        clock_steps=False,
        operator=False,
        vandal=False,
        failover=False,
        same_host=False,
        deaf_work=False,
        ambush=0.0,
        watching=False,
        **more,  # type: ignore[arg-type]
    )
    world = worlds.enter_context(closing(World(1, plan)))
    world.calm = True
    world.limit = 10**9  # these worlds live for hours
    world.rng = Steady()
    return world


def working(world: World) -> str:
    (work,) = world.running
    return work.node.deployment


class Share:
    """The part of the time for which a deployment is at work, looked at every 10 ms."""

    def __init__(self, world: World, deployment: str) -> None:
        self.world, self.deployment = world, deployment
        self.looks = self.hits = self.changes = 0
        self.last: set[str] = set()
        self.look()

    def look(self) -> None:
        now = {w.node.deployment for w in self.world.running}
        self.looks += 1
        self.hits += self.deployment in now
        self.changes += bool(now - self.last)
        self.last = now
        self.world.at(self.world.time + 0.01, self.look)

    @property
    def value(self) -> float:
        return self.hits / self.looks


def keep_restarting(world: World, node: Node, tries: int = 0) -> None:
    """A platform: whatever ends is started again, with a pause that grows, until the next deployment replaces it."""
    if node.deployment not in world.broken:
        if node.alive:
            stop(world, node)
        return
    if not node.alive and tries < 8:
        world.restart(node)
        node, tries = world.nodes[-1], tries + 1
    world.at(world.time + ATTEMPT_OF_A_PLATFORM[min(tries, 3)], lambda: keep_restarting(world, node, tries))


def test_a_deployment_that_dies_at_start_deployed_fifty_times_leaves_the_healthy_one_its_time(
    worlds: ExitStack,
) -> None:
    world = quiet(worlds)
    world.deploy("healthy")
    world.run_until(world.time + 60)
    share = Share(world, "healthy")
    for n in range(50):
        world.broken = {f"broken{n}"}
        keep_restarting(world, world.deploy(f"broken{n}"))
        world.run_until(world.time + 60)

    assert working(world) == "healthy"
    assert share.value >= 0.99
    assert share.changes <= 1 + 50 * 2 * 2  # two tries each, there and back: no ping-pong


def test_the_same_broken_deployment_gets_two_tries_however_often_it_is_started(worlds: ExitStack) -> None:
    world = quiet(worlds)
    world.deploy("healthy")
    world.run_until(world.time + 60)
    share = Share(world, "healthy")
    world.broken.add("broken")
    for _ in range(50):
        world.deploy("broken")
        world.run_until(world.time + 10)

    assert working(world) == "healthy" and share.changes <= 5 and share.value >= 0.99


def test_an_old_deployment_restarted_a_thousand_times_never_regains(worlds: ExitStack) -> None:
    world = quiet(worlds, probation=1.0)
    old = world.deploy("old")
    world.run_until(world.time + 5)
    world.deploy("new")
    world.run_until(world.time + 5)
    assert working(world) == "new"
    share = Share(world, "new")
    for _ in range(1000):
        world.crash(old)
        world.restart(old)
        old = world.nodes[-1]
        world.run_until(world.time + 0.5)

    assert working(world) == "new" and share.value == 1.0


def stop(world: World, node: Node) -> None:
    node.feed(StopAsked())
    node.stopped_at = world.time


def test_a_roll_back_that_reuses_its_key_wins_when_the_newer_one_is_stopped(worlds: ExitStack) -> None:
    world = quiet(worlds, probation=1.0)
    first = world.deploy("one")
    world.run_until(world.time + 5)
    second = world.deploy("two")
    world.run_until(world.time + 5)
    stop(world, first)
    world.run_until(world.time + 5)
    world.deploy("one")
    world.run_until(world.time + 5)
    assert working(world) == "two"  # nobody can tell yet that it is a roll-back
    stop(world, second)
    world.run_until(world.time + 5)
    assert working(world) == "one"
    world.deploy("two")  # a straggler of the deployment that was rolled back
    world.run_until(world.time + 30)
    assert working(world) == "one"
    world.deploy("three")
    world.run_until(world.time + 5)
    assert working(world) == "three"


def test_what_the_operator_chose_stays_until_a_new_deployment(worlds: ExitStack) -> None:
    world = quiet(worlds, probation=1.0)
    one = world.deploy("one")
    world.run_until(world.time + 5)
    two = world.deploy("two")
    world.run_until(world.time + 5)
    world.db.promote(one.name)
    world.changed(Woken())
    world.run_until(world.time + 5)
    assert working(world) == "one"
    world.crash(two)
    world.restart(two)
    world.run_until(world.time + 30)
    assert working(world) == "one"


@pytest.mark.parametrize("leaves", [False, True])
def test_the_superseded_one_takes_back_within_the_probation_and_goes_after_it(worlds: ExitStack, leaves: bool) -> None:
    world = quiet(worlds, leaves=leaves)
    old = world.deploy("old")
    world.run_until(world.time + 5)
    new = world.deploy("new")
    world.run_until(world.time + 5)
    assert working(world) == "new"
    work = new.work
    assert work is not None
    world.gone(work)  # it ends by itself, 5 s after it began
    world.run_until(world.time + 1)
    assert working(world) == "old" and not new.alive
    world.deploy("new")
    world.run_until(world.time + 29)
    assert working(world) == "new" and old.alive and old.state.label == "passive"
    world.run_until(world.time + 5)
    assert old.alive is not leaves
