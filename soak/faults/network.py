"""The network: packets dropped, lost, rejected, connections stalled, cut and refused."""

from __future__ import annotations

import asyncio

from proxy import ANSWERS, ASKS, Link

from soak.faults.scene import Scene, fault, netns, postgres


async def _drop(s: Scene, *chains: str) -> None:
    host = s.host()
    for chain in chains:
        host.iptables("-A", chain, "!", "-i" if chain == "INPUT" else "-o", "lo", "-j", "DROP")
    await s.wait()
    host.iptables("-F")


@fault(netns)
async def drop_both_ways(s: Scene) -> None:
    await _drop(s, "INPUT", "OUTPUT")


@fault(netns)
async def drop_answers(s: Scene) -> None:
    await _drop(s, "INPUT")


@fault(netns)
async def drop_questions(s: Scene) -> None:
    await _drop(s, "OUTPUT")


@fault(netns)
async def drop_on_all_hosts(s: Scene) -> None:
    for host in s.world.hosts:
        host.iptables("-A", "INPUT", "!", "-i", "lo", "-j", "DROP")
    await s.wait()
    for host in s.world.hosts:
        host.iptables("-F")


@fault(netns)
async def lose_packets(s: Scene) -> None:
    host = s.host()
    host.iptables("-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
    await asyncio.sleep(2 * s.while_)
    host.iptables("-F")


@fault(netns)
async def reject_with_reset(s: Scene) -> None:
    host = s.host()
    host.iptables("-A", "OUTPUT", "-p", "tcp", "!", "-o", "lo", "-j", "REJECT", "--reject-with", "tcp-reset")
    await s.wait()
    host.iptables("-F")


async def _stall(s: Scene, *directions: str) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    proxy.stall(*directions)
    await s.wait()
    if s.rng.random() < 0.3:
        proxy.reset()
    proxy.go_on()


@fault(postgres)
async def stall(s: Scene) -> None:
    await _stall(s)


@fault(postgres)
async def stall_questions(s: Scene) -> None:
    """Held up, and delivered late."""
    await _stall(s, ASKS)


@fault(postgres)
async def stall_answers(s: Scene) -> None:
    await _stall(s, ANSWERS)


@fault(postgres)
async def reset_connections(s: Scene) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    for _ in range(s.rng.randint(1, 5)):
        proxy.reset()
        await asyncio.sleep(s.rng.uniform(0, 0.3))


@fault(postgres)
async def refuse_connections(s: Scene) -> None:
    proxy = s.host().proxy
    assert proxy is not None
    proxy.refuse = True
    proxy.reset()
    await s.wait()
    proxy.refuse = False


@fault(postgres)
async def cut_before_the_answer(s: Scene) -> None:
    """What was asked is done, and whoever asked does not learn of it. Each connection, for a while."""
    proxy = s.host().proxy
    assert proxy is not None

    def cut(link: Link, direction: str, message: bytes) -> bool:
        if direction == ANSWERS and message[:1] == b"C":  # CommandComplete
            link.reset()
            return False
        return True

    proxy.on_message = cut
    await s.wait()
    proxy.on_message = None
