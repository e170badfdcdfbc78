"""What platforms do to real processes when they replace, restart and stop them.

Each test is a small driver that behaves as a kind of platform does (docs/platforms.md has which is which). Durations
are scaled: ttl 1.5 s, probation 1 s, and "60 s late" is 4 s here, which is later than both, as it is there. The
witness says that no two ever worked at once; in the end the deployment that should have the bot has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pytest
from harness import BOTLEASE, Run, World, clean_env, until
from servers import free_port

LATE = 4.0
PROBATION = "1"


@dataclass
class Container:
    """One thing the platform keeps: restarted as its policy says, as long as it is wanted."""

    deployment: str
    run: Run
    port: int
    bot: tuple[str, ...]
    wanted: bool = True
    restarts: int = 0
    restart_at: float | None = None


@dataclass
class Platform:
    world: World
    env: dict[str, str]
    key: str  # the variable that names the deployment
    restart: str = "always"  # always, on-failure, never
    stop_signal: int = signal.SIGTERM
    grace: float = 10.0
    to_all: bool = False
    """The signal goes to every process of the container, and more than once."""
    probation: str = PROBATION
    containers: list[Container] = field(default_factory=list)

    def start(self, deployment: str, bot: tuple[str, ...] = ()) -> Container:
        port = free_port()
        container = Container(deployment, self._run(deployment, port, bot), port, bot)
        self.containers.append(container)
        return container

    def _run(self, deployment: str, port: int, bot: tuple[str, ...]) -> Run:
        env = self.env | {self.key: deployment}
        return self.world.run("--probation", self.probation, "--health-port", str(port), bot=bot, env=env)

    def tick(self) -> None:
        """Restart what ended and should not have, with a pause as every platform makes."""
        for c in self.containers:
            code = c.run.process.poll()
            if not c.wanted or code is None or self.restart == "never":
                continue
            if self.restart == "on-failure" and code == 0:
                continue
            if c.restart_at is None:
                c.restart_at = time.monotonic() + min(0.3 * 2**c.restarts, 3.0)
            elif time.monotonic() >= c.restart_at:
                c.restart_at, c.restarts = None, c.restarts + 1
                c.run = self._run(c.deployment, c.port, c.bot)

    def until(self, what: object, limit: float = 20.0) -> None:
        until(lambda: (self.tick(), what())[1], limit)  # type: ignore[operator]

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 5)

    def health(self, c: Container, path: str = "/health") -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{c.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code
        except OSError:
            return 0

    def signal(self, c: Container, number: int) -> None:
        pids = [c.run.pid, *(c.run.children() if self.to_all else [])]
        for pid in pids * (2 if self.to_all else 1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, c: Container) -> None:
        """The stop signal, the grace, SIGKILL."""
        c.wanted = False
        if c.run.process.poll() is None:
            self.signal(c, self.stop_signal)
            try:
                c.run.process.wait(self.grace)
            except subprocess.TimeoutExpired:
                self.kill(c)

    def kill(self, c: Container) -> None:
        """As the end of a container: every process of it, at once."""
        c.wanted = False
        for pid in [c.run.pid, *c.run.children()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        c.run.process.wait()

    def active(self) -> str | None:
        """The deployment that has the bot, as the operator sees it, once the witness has seen it at work there."""
        done = subprocess.run(
            [*BOTLEASE, "status", "--json"],
            env=clean_env(BOTLEASE_DATABASE_URL=self.world.url),
            capture_output=True,
            text=True,
        )
        for line in done.stdout.splitlines():
            bot = json.loads(line)
            if bot["lease"] is None or bot["lease"]["term"] not in self.world.terms():
                continue
            for i in bot["instances"]:
                if bot["lease"]["holder"] == i["instance_id"]:
                    return str(i["deployment"]).partition(":")[2]
        return None

    def ends_with(self, deployment: str) -> None:
        """The bot works there, and goes on to; nothing overlapped, and the journal agrees."""
        self.until(lambda: self.active() == deployment)
        stamped = max(last for _, last in self.world.stamps().values())
        self.until(lambda: max(last for _, last in self.world.stamps().values()) > stamped + 0.3)
        assert self.active() == deployment
        assert self.world.overlap() == 0
        done = subprocess.run(
            [*BOTLEASE, "verify"], env=clean_env(BOTLEASE_DATABASE_URL=self.world.url), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


RAILWAY = {"RAILWAY_ENVIRONMENT_ID": "e"}
RENDER = {"RENDER": "true"}
HEROKU = {"DYNO": "worker.1"}
FLY = {"FLY_APP_NAME": "bot"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def railway(world: World, **more: object) -> Platform:
    return Platform(world, RAILWAY, "RAILWAY_DEPLOYMENT_ID", restart="on-failure", grace=0.0, **more)  # type: ignore[arg-type]


@pytest.fixture
def broken(world: World) -> tuple[str, ...]:
    return world.bot(exit=3, **{"for": 0.1})


def test_start_first_with_a_health_gate(world: World) -> None:
    p = railway(world, probation="4")
    one = p.start("d1")
    p.until(lambda: p.health(one) == 200)
    two = p.start("d2")
    p.until(lambda: p.health(two) == 200)  # as often as it can be asked: it must not open for a moment
    healthy = time.clock_gettime(time.CLOCK_BOOTTIME)
    began = min(first for (_, term), (first, _) in world.stamps().items() if term == 2)
    assert healthy - began >= 2  # nearly the probation: until then the old one is there to take back
    p.stop(one)
    p.ends_with("d2")


def test_start_first_with_a_health_gate_and_a_broken_newcomer(world: World, broken: tuple[str, ...]) -> None:
    p = railway(world)
    one = p.start("d1")
    p.until(lambda: p.health(one) == 200)
    two = p.start("d2", broken)
    p.until(lambda: two.restarts == 2 and p.health(two, "/livez") == 200)
    for _ in range(10):  # the gate never opens: the platform gives the deployment up and keeps the old one
        p.wait(0.1)
        assert p.health(two) == 503
    p.stop(two)
    assert one.run.process.poll() is None and one.restarts == 0
    p.ends_with("d1")


def test_the_gate_stays_shut_while_a_newcomer_fails_its_probation_and_is_stopped(world: World) -> None:
    p = railway(world)
    one = p.start("d1")
    p.until(lambda: p.health(one) == 200)
    port = free_port()
    ailing = ("--healthy-if", str(world.folder / "never"), "--healthy-within", "1.5", "--stop-grace", "1.5")
    deaf = world.run(
        *("--probation", "20", "--health-port", str(port), *ailing),
        bot=world.bot(deaf=1),
        env=RAILWAY | {"RAILWAY_DEPLOYMENT_ID": "d2"},
    )
    two = Container("d2", deaf, port, (), wanted=False)
    answers = set()
    p.until(lambda: (answers.add(p.health(two)), deaf.process.poll() is not None)[1])
    assert "did not pass its probation" in deaf.text()
    assert answers <= {0, 503}
    p.ends_with("d1")


def test_start_first_without_a_gate(world: World) -> None:
    p = Platform(world, HEROKU, "HEROKU_RELEASE_VERSION")
    one = p.start("v1")
    p.until(lambda: p.active() == "v1")
    p.start("v2")
    p.stop(one)  # at once, as Heroku does
    p.ends_with("v2")


def test_start_first_and_killed_at_once_without_a_signal(world: World) -> None:
    p = railway(world)  # without a health check the old one is killed as soon as the new one has been started
    one = p.start("d1")
    p.until(lambda: p.active() == "d1")
    p.start("d2")
    p.kill(one)
    p.ends_with("d2")


def test_stop_first(world: World) -> None:
    p = Platform(world, {"BOTLEASE_PLATFORM": "docker"}, "BOTLEASE_TASK", restart="always")
    one = p.start("c1")
    p.until(lambda: p.active() == "c1")
    p.stop(one)
    assert one.run.process.returncode == 0
    p.start("c2")
    p.ends_with("c2")
    assert world.gap(2) < 3


def test_stop_first_with_a_bot_that_does_not_stop_in_time(world: World) -> None:
    p = Platform(world, {"BOTLEASE_PLATFORM": "docker"}, "BOTLEASE_TASK", grace=0.5)
    one = p.start("c1", world.bot(deaf=1))
    p.until(lambda: p.active() == "c1")
    p.stop(one)  # killed in the middle of its drain
    p.start("c2")
    p.ends_with("c2")


def test_the_stop_signal_comes_a_minute_late(world: World) -> None:
    p = Platform(world, RENDER, "RENDER_GIT_COMMIT")
    one = p.start("abc")
    p.until(lambda: p.active() == "abc")
    p.start("def")
    p.until(lambda: p.active() == "def")
    p.wait(LATE)  # Render restarts what ends: the old one stays, passive, until it is told
    assert one.run.process.poll() is None and one.restarts == 0
    p.stop(one)
    assert one.run.process.returncode == 0
    p.ends_with("def")


def test_the_stop_signal_comes_a_minute_late_and_the_newcomer_breaks_meanwhile(
    world: World, broken: tuple[str, ...]
) -> None:
    p = Platform(world, RENDER, "RENDER_GIT_COMMIT")
    p.start("abc")
    p.until(lambda: p.active() == "abc")
    two = p.start("def", broken)
    p.until(lambda: two.restarts >= 2)
    p.ends_with("abc")
    assert len(world.terms()) <= 5


def test_sigint_in_place(world: World) -> None:
    p = Platform(world, FLY, "FLY_MACHINE_VERSION", stop_signal=signal.SIGINT, grace=5.0, restart="on-failure")
    one = p.start("m1")
    p.until(lambda: p.active() == "m1")
    p.stop(one)
    assert one.run.process.returncode == 0
    p.start("m2")
    p.ends_with("m2")


def test_the_signal_goes_to_every_process_and_more_than_once(world: World) -> None:
    p = Platform(world, HEROKU, "HEROKU_RELEASE_VERSION", to_all=True)
    one = p.start("v1", world.bot(slow=0.3))
    p.until(lambda: p.active() == "v1")
    p.start("v2")
    p.stop(one)
    assert one.run.process.returncode == 0
    p.ends_with("v2")


def test_the_signal_goes_to_every_process_and_nobody_follows(world: World) -> None:
    p = Platform(world, HEROKU, "HEROKU_RELEASE_VERSION", to_all=True)
    one = p.start("v1")
    p.until(lambda: p.active() == "v1")
    p.stop(one)
    terms = world.terms()
    p.wait(1.0)
    assert world.terms() == terms == [1]  # after a stop signal nothing is acquired again
    p.start("v1")  # the daily restart
    p.ends_with("v1")


@pytest.mark.parametrize(("policy", "has_it"), [("always", "d2"), ("on-failure", "d2"), ("never", "d1")])
def test_a_supervisor_that_is_killed_is_restarted_or_not(world: World, policy: str, has_it: str) -> None:
    p = railway(world)
    p.restart = policy
    one = p.start("d1")
    p.until(lambda: p.active() == "d1")
    two = p.start("d2")
    p.until(lambda: world.terms() == [1, 2])  # not by asking: on a busy machine that takes longer than the probation
    two.run.signal(signal.SIGKILL)
    p.until(lambda: p.active() == "d1" or two.restarts > 0)
    p.ends_with(has_it)
    assert one.run.process.poll() is None or policy != "never"


@pytest.mark.parametrize("policy", ["always", "on-failure", "never"])
def test_an_old_container_is_never_in_the_way_whatever_restarts_it(world: World, policy: str) -> None:
    p = railway(world)
    p.restart = policy
    one = p.start("d1")
    p.until(lambda: p.active() == "d1")
    two = p.start("d2")
    p.until(lambda: p.health(two) == 200)
    if policy == "always":
        one.run.signal(signal.SIGKILL)
        p.until(lambda: one.restarts >= 1)
    else:
        p.until(lambda: one.run.process.poll() == 0)  # superseded for good
        assert one.restarts == 0
    p.ends_with("d2")
    assert world.terms() == [1, 2]


def test_a_bot_that_crashes_for_good_leaves_it_to_the_restart_policy(world: World) -> None:
    p = Platform(world, KUBERNETES, "POD_TEMPLATE_HASH")
    dies = world.bot(exit=4, **{"for": 0.2})
    one = p.start("h1", dies)
    p.until(lambda: len(world.stamps()) >= 2)  # within its term, after the back-off
    assert world.terms() == [1] and one.restarts == 0
    p.stop(one)
    p.start("h2")
    p.ends_with("h2")


def test_a_roll_back_with_the_same_id(world: World) -> None:
    p = Platform(world, KUBERNETES, "POD_TEMPLATE_HASH")
    one = p.start("h1")
    p.until(lambda: p.active() == "h1")
    two = p.start("h2")
    p.until(lambda: p.health(two, "/readyz") == 200)
    p.stop(one)
    p.until(lambda: p.active() == "h2")
    again = p.start("h1")  # kubectl rollout undo
    p.until(lambda: p.health(again, "/readyz") == 200)  # ready without the lease, or the roll-out would hang
    assert p.active() == "h2"
    p.stop(two)
    p.until(lambda: p.active() == "h1")
    p.start("h2")  # a pod of the deployment that was rolled back, made anew by an eviction
    p.wait(1.0)
    p.ends_with("h1")


def test_two_replicas_of_one_deployment_do_not_fight(world: World) -> None:
    p = Platform(world, KUBERNETES, "POD_TEMPLATE_HASH")
    one = p.start("h1")
    p.until(lambda: p.active() == "h1")
    p.start("h1")
    p.wait(2.0)
    assert world.terms() == [1]
    p.stop(one)
    p.ends_with("h1")
    assert world.terms() == [1, 2]
