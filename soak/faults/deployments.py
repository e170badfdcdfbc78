"""Deployments, one after another, at once, broken, and back."""

from __future__ import annotations

import asyncio
import signal

from soak.deployments import Deployment
from soak.faults.scene import Scene, fault


async def _redeploy(s: Scene, **odd: object) -> Deployment:
    w = s.world
    host = s.rng.choice(w.hosts)
    return w.deploy(host, f"v{w.count}", **odd)


@fault()
async def deploy(s: Scene) -> None:
    """A new deployment, and the platform stops the oldest somewhat later."""
    old = s.world.deployments[0]
    await _redeploy(s)
    await asyncio.sleep(s.rng.uniform(0, 2.5))
    await old.retire(s.rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)))


@fault()
async def deploy_a_broken_one(s: Scene) -> None:
    new = await _redeploy(s, inside=False, broken=s.rng.uniform(0.05, 1.0))
    await asyncio.sleep(s.rng.uniform(2, 5))
    await new.retire()


@fault()
async def deploy_two_at_once(s: Scene) -> None:
    old = s.world.deployments[:2]
    await _redeploy(s)
    await _redeploy(s)
    await asyncio.sleep(s.rng.uniform(0, 2))
    await asyncio.gather(*(d.retire() for d in old))


@fault()
async def roll_back(s: Scene) -> None:
    """The key of an older deployment once more."""
    w = s.world
    keys = sorted({d.key for d in w.deployments})
    w.deploy(s.rng.choice(w.hosts), s.rng.choice(["v0", *keys]))
    await asyncio.sleep(s.rng.uniform(0.5, 2))
    newest = w.deployments[-2]
    await newest.retire()
