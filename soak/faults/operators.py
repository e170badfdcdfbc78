"""What an operator may type."""

from __future__ import annotations

import asyncio

from soak.faults.scene import Scene, fault


@fault()
async def operator_deactivates(s: Scene) -> bool:
    done = await s.sql("UPDATE bot_instances SET is_active = FALSE")
    await s.wait()
    await _promote(s)
    return done is not None


async def _promote(s: Scene) -> None:
    for _ in range(100):
        living = await s.live_instances()
        if living:
            chosen = s.rng.choice(living)
            await s.sql(f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{chosen}'")
            # A supervisor that is stopped in the middle of a transaction can keep the file locked.
            if await s.sql("SELECT 1 FROM bot_instances WHERE is_active"):
                return
        await asyncio.sleep(0.1)


@fault()
async def operator_promotes(s: Scene) -> None:
    for _ in range(s.rng.randint(1, 4)):
        await _promote(s)
        await asyncio.sleep(s.rng.uniform(0, 0.4))


@fault()
async def operator_deletes_the_lease(s: Scene) -> bool:
    s.harms("edited")
    return await s.sql("DELETE FROM bot_leases") is not None


@fault()
async def operator_deletes_the_instances(s: Scene) -> bool:
    done = await s.sql("DELETE FROM bot_instances")
    await _promote(s)
    return done is not None


@fault()
async def operator_pauses(s: Scene) -> bool:
    paused = await s.sql("UPDATE bot_leases SET paused = TRUE")
    await s.wait()
    for _ in range(50):
        await s.sql("UPDATE bot_leases SET paused = FALSE")
        if await s.sql("SELECT 1 FROM bot_leases WHERE paused") == []:
            break
        await asyncio.sleep(0.1)
    return paused is not None


@fault()
async def operator_edits_the_lease(s: Scene) -> bool:
    s.harms("edited")
    edits = ("beat = beat + 1000", "beat = 0", "nonce = 'x'", "term = term + 5", "ttl = 2 * ttl", "holder = NULL")
    done = await s.sql(f"UPDATE bot_leases SET {s.rng.choice(edits)}")
    await s.sql("UPDATE bot_leases SET ttl = 1.5 WHERE ttl > 10")
    return done is not None


# But for the name of the bot: who is taken out of it by name is missed by nobody, as if he had been deleted, and has a
# row all the same.
ANYTHING = {
    "bot_leases": "served = 0|served = 1000000|origin = 'x'|proof = ''|ttl = 0.2|ttl = 0",
    "bot_instances": "generation = NULL|generation = 1|generation = generation + 1000|deployment = 'v0'"
    "|deployment = NULL|state = 'x'|host = ''|pid = 1|beat = 0|beat = beat + 1|term = 1000|version = NULL"
    "|stop_reason = 'superseded'|ended_at = last_heartbeat|ended_at = NULL|last_heartbeat = started_at",
    "bot_terms": "probation = 'on'|probation = ''|probation = 'passed'|reason = 'failed'|how = 'died'|instance_id = 'x'"
    "|deployment = NULL|ttl = 0.1|last_beat = NULL",
    "bot_deployments": "generation = generation + 1000|deployment = 'x' || generation",
}


@fault()
async def operator_types_anything(s: Scene) -> bool:
    """An edit that nobody thought of. (Of the journal only what is open: what is over is what the witness is asked
    about.)"""
    s.harms("typed")
    table = s.rng.choice(list(ANYTHING))
    edit = s.rng.choice(ANYTHING[table].split("|"))
    some = {"bot_terms": " WHERE released_at IS NULL", "bot_instances": s.rng.choice(("", " WHERE ended_at IS NULL"))}
    typed = f"UPDATE {table} SET {edit}{some.get(table, '')}"
    if s.rng.random() < 0.1:
        typed = "DELETE FROM bot_deployments"
    s.world.tell(typed)
    done = await s.sql(typed)
    await s.sql("UPDATE bot_leases SET ttl = 1.5 WHERE ttl < 1")  # whoever registers takes it for his own
    await _promote(s)
    return done is not None
