"""Processes: stopped, killed, frozen, starved, out of memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

from soak.faults.scene import Scene, cgroups, fault
from soak.oracle import now


async def _stop(s: Scene, part: str) -> bool:
    d = s.whom(lambda d: part != "everything" or not s.unleashed(d))
    if part == "everything" and s.unleashed(d):
        return False
    stopped = d.part(part)
    if not d.send(part, signal.SIGSTOP):
        return False
    await s.wait()
    _continue(s, [*stopped, *d.tree()])
    return True


def _continue(s: Scene, pids: list[int]) -> None:
    """Also those whose parent has ended meanwhile."""
    s.rng.shuffle(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@fault()
async def stop_supervisor(s: Scene) -> bool:
    return await _stop(s, "supervisor")


@fault()
async def stop_reaper(s: Scene) -> bool:
    return await _stop(s, "reaper")


@fault()
async def stop_bot(s: Scene) -> bool:
    return await _stop(s, "bot")


@fault()
async def stop_everything(s: Scene) -> bool:
    return await _stop(s, "everything")


@fault()
async def kill_supervisor(s: Scene) -> bool:
    return s.whom().send("supervisor", signal.SIGKILL)


@fault()
async def kill_reaper(s: Scene) -> bool:
    return s.whom().send("reaper", signal.SIGKILL)


@fault()
async def kill_bot(s: Scene) -> bool:
    return s.whom().send("bot", signal.SIGKILL)


@fault()
async def kill_everything(s: Scene) -> bool:
    return s.whom().send("everything", signal.SIGKILL)


@fault()
async def kill_all_deployments(s: Scene) -> bool:
    sent = [d.send("everything", signal.SIGKILL) for d in s.world.deployments]
    return any(sent)


@fault()
async def stop_all_deployments(s: Scene) -> bool:
    """A machine that is suspended, as far as that can be done to processes."""
    deployments = [d for d in s.world.deployments if not s.unleashed(d)]
    stopped = [pid for d in deployments for pid in d.tree()]
    sent = [d.send("everything", signal.SIGSTOP) for d in deployments]
    await s.wait()
    _continue(s, [*stopped, *(pid for d in deployments for pid in d.tree())])
    return any(sent)


@fault()
async def terminate(s: Scene) -> bool:
    """The platform restarts it: a stop signal, then the same deployment again."""
    if not s.whom().send("supervisor", signal.SIGTERM):
        return False
    await asyncio.sleep(s.rng.uniform(0, 1))
    return True


@fault(cgroups)
async def freeze(s: Scene) -> bool:
    """As ``docker pause`` does it. On thawing everything runs at once, the late and the fence."""
    d = s.whom(lambda d: not s.unleashed(d))
    if d.cgroup is None or s.unleashed(d) or not d.tree():
        return False
    took = d.cgroup.freeze(True)
    await s.wait()
    s.oracle.thaws.append(now())
    d.cgroup.freeze(False)
    return took


@fault(cgroups)
async def freeze_all(s: Scene) -> bool:
    frozen = [d.cgroup for d in s.world.deployments if d.cgroup is not None and not s.unleashed(d)]
    took = [cgroup.freeze(True) for cgroup in frozen]
    await s.wait()
    s.rng.shuffle(frozen)
    for cgroup in frozen:
        s.oracle.thaws.append(now())
        cgroup.freeze(False)
    return any(took)


@fault(cgroups)
async def starve(s: Scene) -> bool:
    """1 to 5 % of a core for a whole deployment. Not where something has to be found by one that is starved itself."""
    d = s.whom(lambda d: not d.escapes)
    if d.cgroup is None or d.escapes or not d.cgroup.has("cpu"):
        return False
    took = d.cgroup.starve(s.rng.choice((0.01, 0.02, 0.05)))
    await asyncio.sleep(2 * s.while_)
    d.cgroup.starve(None)
    return took


HOG = """
import os
open("/proc/self/oom_score_adj", "w").write("-999")
taken = [os.urandom(1 << 20) for _ in range(60)]
"""


@fault(cgroups)
async def out_of_memory(s: Scene) -> bool:
    """The kernel kills in this deployment until there is memory again."""
    d = s.whom()
    if d.cgroup is None or not d.cgroup.has("memory") or not d.tree():
        return False
    killed = d.cgroup.killed()
    d.cgroup.limit(d.cgroup.used() + (8 << 20))
    files = d.cgroup.files()
    script = "".join(f"echo $$ >{f} || exit 99; " for f in files) + 'exec "$@"'
    hog = subprocess.Popen(["sh", "-c", script, "sh", sys.executable, "-S", "-c", HOG], stderr=subprocess.DEVNULL)
    end = now() + 3
    try:
        while hog.poll() is None and now() < end:
            await asyncio.sleep(0.05)
    finally:
        hog.kill()
    d.cgroup.limit(None)
    # Frozen by the fault beside this one it dies when that one is undone: to wait for it in our loop would be for ever.
    await asyncio.to_thread(hog.wait)
    return d.cgroup.killed() > killed
