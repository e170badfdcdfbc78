"""What is said: the timings, what a store answers, the questions, events and actions of :mod:`botlease.core`.

Only values; nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final, NamedTuple

from botlease.value import value

TERM_GAP: Final = 1000
"""Terms skipped when the database is not the one the row was written in: a fail-over can lose the last
commits, and with them terms that were already handed out. Nobody acquires 1,000 times in a lost tail;
:attr:`View.era` covers a second fail-over that loses the first one's terms too."""

TRIES: Final = 2
"""Failed probations after which a deployment is in quarantine: it only fills a vacancy from then on. One could be bad
luck (the database, the machine); a third would only cost the healthy one's time."""


UNPLACED: Final = 0
"""The slot of a fleet's bot that nobody was given yet."""
LEAVING: Final = -1
"""The slot of a bot that is to be taken out of its fleet as soon as it has ended."""


class TimingError(ValueError):
    """The timings contradict each other; the message shows the arithmetic."""


@dataclass(frozen=True)
class Timing:
    """Every duration in seconds. Checked when made, refused with the arithmetic, never adjusted in silence."""

    ttl: float = 10.0
    renew_every: float = 2.0
    attempt: float = 1.5
    """How long one store call may take, whatever the driver does."""
    lock_delay: float = 1.0
    """Wait after an expiry before working: what the dead holder had in flight arrives in this time."""
    kill_budget: float = 1.0
    """From the end of trust to the last process of the tree being gone."""
    stop_grace: float = 10.0
    """From SIGTERM to SIGKILL in a planned drain."""
    rho: float = 0.01
    """Bound on the difference of clock rates. Kernels slew by at most 500 ppm; the rest is reserve."""
    probation: float = 30.0
    """How long a newcomer must work well before the one it took over from may go. 0: no probation."""

    @classmethod
    def for_ttl(cls, ttl: float, *, stop_grace: float = 10.0, probation: float = 30.0) -> Timing:
        """The defaults scaled to ``ttl``: they are 20 %, 15 % and 10 % of it, kill_budget between 0.1 and 1 s."""
        return cls(
            ttl=ttl,
            renew_every=ttl * 0.2,
            attempt=ttl * 0.15,
            kill_budget=min(1.0, ttl / 6),
            stop_grace=stop_grace,
            probation=probation,
        )

    @cached_property  # asked a dozen times for each renewal
    def trust(self) -> float:
        return self.ttl * (1 - self.rho) - self.kill_budget

    @cached_property
    def drain_after(self) -> float:
        """Without a confirmed renewal the work is asked to stop this long after the last one was sent."""
        return self.ttl * 0.6

    @cached_property
    def danger_after(self) -> float:
        """Without a confirmed renewal for so long the work is told to open nothing new: one attempt has failed by
        then, and the drain is one more away."""
        return min(self.drain_after, max(self.ttl * 0.4, self.renew_every + self.attempt))

    def patience(self, row_ttl: float) -> float:
        """How long a challenger must see the row unchanged. The longer ttl counts where two differ."""
        return max(self.ttl, row_ttl) * (1 + self.rho)

    def __post_init__(self) -> None:
        for name in ("ttl", "renew_every", "attempt", "lock_delay", "kill_budget", "stop_grace", "rho", "probation"):
            value = getattr(self, name)
            if not 0 <= value < 86_400:
                raise TimingError(f"{name} is {value:g}; it must be between 0 and 86400 seconds")
        if self.ttl < 1:
            raise TimingError(f"ttl is {self.ttl:g} s; it must be at least 1 s")
        if not 0 < self.rho < 0.5 or self.kill_budget < 0.1:
            raise TimingError(
                f"rho is {self.rho:g} and kill_budget {self.kill_budget:g} s; need 0 < rho < 0.5, kill_budget >= 0.1"
            )
        if self.renew_every <= 0 or self.attempt <= 0:
            raise TimingError("renew_every and attempt must be above 0")
        need = self.renew_every + 2 * self.attempt
        if need > self.drain_after + 1e-9:
            raise TimingError(
                f"renew_every + 2*attempt = {self.renew_every:g} + 2*{self.attempt:g} = {need:g} s, "
                f"but it must fit into 0.6*ttl = {self.drain_after:g} s, or one slow answer ends a term"
            )
        if self.drain_after >= self.trust:
            raise TimingError(
                f"0.6*ttl = {self.drain_after:g} s must be below ttl*(1-rho) - kill_budget = "
                f"{self.ttl:g}*{1 - self.rho:g} - {self.kill_budget:g} = {self.trust:g} s, or no time is left to drain"
            )


class Reason(StrEnum):
    """Why a term ended or an instance stopped: the closed list of the journal."""

    STOPPED = "stopped"  # a stop signal reached the instance
    SUPERSEDED = "superseded"  # another instance has the assignment
    DEACTIVATED = "deactivated"  # the operator took the assignment away, nobody has it
    PAUSED = "paused"  # the operator paused the bot; the assignment stays
    WORK_ENDED = "work_ended"  # the work came to an end by itself (or used up its crash budget)
    FAILED = "failed"  # the newcomer did not pass its probation
    UNHEALTHY = "unhealthy"  # no proof of progress came from the work, and another instance can take over
    SILENT = "store_silent"  # no renewal was confirmed in time
    LOST = "lease_lost"  # the row says that the term is over
    CHANGED = "store_changed"  # another database, timeline or file answered
    EXPIRED = "expired"  # written by the successor: the term ran out
    DIED = "died"  # written by the successor: the kernel proved the holder dead
    GIVEN_BACK = "given_back"  # granted, but never believed in: no work ran
    REFUSED = "refused"  # another instance is running and this one was told not to wait
    COPIED = "copied"  # somebody else writes under its name: a copy of this process, after a machine was restored


class Mode(StrEnum):
    PREEMPT = "preempt"  # a strictly newer generation asks for the handover
    WAIT = "wait"  # only ever fills a vacancy
    REFUSE = "refuse"  # leaves if another instance is alive: a second start by hand


class Probation(StrEnum):
    """The probation of a term, as the journal keeps it."""

    NONE = ""
    ON = "on"
    PASSED = "passed"


class How(StrEnum):
    """The evidence an acquire rests on."""

    RELEASED = "released"
    EXPIRED = "expired"
    DIED = "died"


# What the store says ---------------------------------------------------------------------------------


@value
class Lease:
    """The occupancy row: who may still be running."""

    term: int
    beat: int
    nonce: str
    holder: str | None
    ttl: float
    origin: str  # the database (system, timeline) under which the row was written
    proof: str = ""  # where the owner of the work runs: boot id, pid namespace, pid, start time
    served: int = 0  # the highest generation that ever acquired it

    @property
    def key(self) -> tuple[int, int, str, str | None]:
        return (self.term, self.beat, self.nonce, self.holder)


@value
class Peer:
    """The instance that has the assignment."""

    instance_id: str
    generation: int
    ended: bool
    beat: int
    age: float  # seconds since its last heartbeat by the database's clock: never for safety

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.instance_id, self.generation, self.beat)


@value
class View:
    """One read of the database, as one statement saw it."""

    lease: Lease | None
    origin: str
    assigned: Peer | None
    generation: int  # ours; 0: our row is not there
    ahead: int = 0  # live standbys that come before us in a fail-over
    renewed_ago: float = (
        0.0  # by the database's clock: for display and refusals, and for when to look, never for safety
    )
    era: int = 0  # rises from one incarnation of the database to the next; terms of a new one begin above it
    paused: bool = False  # the operator wants nobody to work for now
    probation: Probation = Probation.NONE  # the probation of the lease's term
    failures: int = 0  # probations that our deployment did not pass
    others: int = 0  # live instances of this bot beside us
    ended: bool = False  # our own row says that we are no more
    rooted: How = How.EXPIRED  # the evidence of the lease's term, or of the one that a row of deaths goes back to


# Questions, events, actions --------------------------------------------------------------------------


class Verb(StrEnum):
    REGISTER = "register"
    READ = "read"
    CLAIM = "claim"
    ACQUIRE = "acquire"
    RENEW = "renew"
    RELEASE = "release"
    PASS = "pass"  # noqa: S105 - no password: the probation is passed
    TOUCH = "touch"
    LEAVE = "leave"


class Held(NamedTuple):
    """Exactly one hold of the lease, as the one who has it knows it."""

    term: int
    nonce: str
    beats: tuple[int, ...] = (0,)
    """What the row's beat can be: the last one that was confirmed to us, or one that we tried to write since. If it is
    none of them, a copy of us writes too: of a virtual machine restored twice from one snapshot both have the same
    term, nonce and name, and without this both would renew for ever."""


@value
class Question:
    """One store call. ``serial`` is what its answer names."""

    verb: Verb
    serial: int
    asked_at: float
    key: tuple[int, int, str, str | None] | None = None  # acquire: the row as we saw it; of a holder: or its release
    floor: int = 0  # acquire: the term must rise above this
    origin: str = ""  # acquire: the database in which the row was seen
    how: How = How.RELEASED
    lock_delay: float = 0.0  # acquire: how long to wait before working, in seconds
    probation: Probation = Probation.NONE  # acquire: whether the term begins on probation
    held: Held | None = None  # renew, release, pass: exactly this hold
    beat: int = 0  # renew: the new beat
    source: tuple[str, int, int] | None = None  # claim: who has the assignment now, its generation and beat
    reason: Reason | None = None
    pass_on: bool = False  # release, leave: give the assignment to the best live standby
    leave: bool = False  # release: the instance ends with it
    label: str = ""  # touch, and a renewal that is a touch as well: the state for the status table


@value
class Registered:
    serial: int
    view: View


@value
class Seen:
    serial: int
    view: View


@value
class Claimed:
    serial: int
    ok: bool


@value
class Granted:
    serial: int
    term: int
    nonce: str
    origin: str


@value
class Denied:
    """A definite no: acquire, renew or release matched no row."""

    serial: int


@value
class Renewed:
    serial: int
    assigned: bool
    vacant: bool  # nobody has the assignment
    origin: str
    paused: bool = False


@value
class Done:
    """Release, pass, touch or leave was confirmed."""

    serial: int


@value
class Failed:
    """The outcome is unknown: an error, a lost connection, or the attempt's deadline."""

    serial: int
    nonce: str = ""  # acquire: the one it may have written


@value
class Tick:
    pass


@value
class Woken:
    """A hint that the database changed. It is never proof of anything."""


@value
class StopAsked:
    reason: Reason = Reason.STOPPED


@value
class WorkEnded:
    """The whole process tree of the work is gone and reaped."""

    term: int
    done: bool = False  # it returned: its job is done, which is no failure even on probation
    unowned: bool = False
    """Who owned it was killed, and it ended with him. The lease names him, and so proves nothing any more: the term is
    over, and the instance goes on with another one."""


@value
class Ready:
    """A warm start: the work has come to its gate, or is not there any more."""

    ready: bool


@value
class Crashed:
    """The work died and will be started again within the term unless it is drained before."""

    term: int


@value
class Healthy:
    """The work proved progress."""

    term: int


@value
class Unhealthy:
    """The work has not proved progress for too long, though it runs."""

    term: int


@value
class HolderDied:
    """The kernel of this host proved the owner of this (term, nonce) dead."""

    term: int
    nonce: str


Event = (
    Registered
    | Seen
    | Claimed
    | Granted
    | Denied
    | Renewed
    | Done
    | Failed
    | Tick
    | Woken
    | StopAsked
    | WorkEnded
    | Ready
    | Crashed
    | Healthy
    | Unhealthy
    | HolderDied
)


@value
class Ask:
    question: Question


@value
class Arm:
    """Set the kernel fence of the work to this moment."""

    until: float


@value
class Start:
    term: int
    nonce: str
    until: float


@value
class Drain:
    until: float
    reason: Reason


@value
class Kill:
    reason: Reason


@value
class Restart:
    """Start the work again within the term: nobody else is there to take over, or it has proved itself."""

    hung: bool
    """It is to be ended first. Else it has crashed: its first restart in a row need not wait."""


@value
class Danger:
    """The end of trust comes nearer (or not any more): open nothing new, finish what is open."""

    on: bool


@value
class Watch:
    """A new holder was seen: if its proof is of this host, watch it die."""

    lease: Lease


@value
class End:
    reason: Reason


Action = Ask | Arm | Start | Drain | Kill | Restart | Danger | Watch | End
