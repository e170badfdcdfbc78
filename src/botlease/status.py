"""What the database says, for people and for scripts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from botlease.model import TRIES
from botlease.text import clean

FIELDS: Final = (
    "instance_id",
    "is_active",
    "state",
    "term",
    "deployment",
    "generation",
    "host",
    "pid",
    "started_at",
    "last_heartbeat",
)


GATEWAY: Final = ("api", "polled_at", "waiting", "repeated", "set_aside", "conflicts", "conflict_at", "webhook")
"""What is said about each token that is polled through the gateway."""


def _time(value: Any) -> Any:
    return value.isoformat(sep=" ", timespec="milliseconds") if isinstance(value, datetime) else value


def by_bot(overview: dict[str, Any], *, ended: bool = False) -> list[dict[str, Any]]:
    """One dictionary for each bot, in the documented form. Ended instances are history: left out unless asked."""
    bots: dict[str, dict[str, Any]] = {}
    silent = {row["bot"]: row["silent"] for row in overview["leases"]}
    for row in overview["leases"]:
        lease = {k: _time(row[k]) for k in ("term", "beat", "holder", "ttl", "renewed_at")}
        bots[row["bot"]] = _bot(row["bot"], lease, row["paused"]) | {"fleet": row.get("fleet")}
    for row in overview["instances"]:
        if row["bot"] is None or (row["ended_at"] is not None and not ended and not row["is_active"]):
            continue  # rows of an earlier system have no bot
        entry = bots.setdefault(row["bot"], _bot(row["bot"], None, False))
        instance = {name: _time(row[name]) for name in FIELDS}
        lease = entry["lease"]
        if lease is not None and lease["holder"] == row["instance_id"]:
            # The holder's heartbeat is its renewal; its own row is touched once a ttl only.
            instance["last_heartbeat"] = max(str(instance["last_heartbeat"]), str(lease["renewed_at"]))
        # By the database's clock, as for a fail-over. A time that is none was written by hand: no sign of a death.
        signs = [row["silent"], *([silent[row["bot"]]] if lease and lease["holder"] == row["instance_id"] else [])]
        since = min((s for s in signs if s is not None), default=0.0)
        instance["silent"] = lease is not None and since >= 3 * max(1.0, lease["ttl"])
        entry["instances"].append(instance)
    for row in overview.get("polls", ()):
        if row["bot"] in bots:
            bots[row["bot"]]["gateway"].append({name: _time(row[name]) for name in GATEWAY})
    for row in overview["failures"]:
        if row["failures"] >= TRIES and row["bot"] in bots:
            bots[row["bot"]]["quarantine"].append(row["deployment"])
    for bot in bots.values():
        bot["handover"] = handover(bot)
    return list(bots.values())


def _bot(name: str, lease: dict[str, Any] | None, paused: bool) -> dict[str, Any]:
    more: dict[str, Any] = {"instances": [], "quarantine": [], "handover": None, "gateway": [], "fleet": None}
    return {"bot": name, "paused": paused, "lease": lease, **more}


def handover(bot: dict[str, Any]) -> dict[str, Any] | None:
    """A change of holder that is on its way, and how far it is: requested (the newcomer is not ready), ready (it is,
    and asks next), in progress (it has the assignment, the holder drains). None: there is none, or it is done."""
    holder = bot["lease"]["holder"] if bot["lease"] else None
    by_id = {i["instance_id"]: i for i in bot["instances"]}
    for i in bot["instances"]:
        if i["is_active"] and holder is not None and i["instance_id"] != holder:
            return {"from": holder, "to": i["instance_id"], "step": "in progress"}
    here = by_id.get(holder)
    newer = [i for i in bot["instances"] if here and (i["generation"] or 0) > (here["generation"] or 0)]
    for i in sorted((i for i in newer if not i["silent"]), key=lambda i: -(i["generation"] or 0)):
        step = {"warming": "requested", "standby": "ready"}.get(i["state"])
        if step is not None and i["deployment"] not in bot["quarantine"] and not bot["paused"]:
            return {"from": holder, "to": i["instance_id"], "step": step}
    return None


def works(bot: dict[str, Any] | None, instance: dict[str, Any]) -> bool:
    lease = bot["lease"] if bot else None
    its = bool(lease and lease["holder"] == instance["instance_id"])
    return its and instance["state"] == "active" and not instance["silent"]


def stands_by(bot: dict[str, Any] | None, instance: dict[str, Any]) -> bool:
    """It could take over: it lives, and is not the holder nor on its way out."""
    lease = bot["lease"] if bot else None
    other = bool(lease and lease["holder"] != instance["instance_id"])
    return other and instance["state"] in ("standby", "passive") and not instance["silent"]


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells to lines, columns as wide as they must be."""
    rows = [tuple(clean(cell) for cell in row) for row in rows]
    widths = [max(len(r[n]) for r in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _gateway(bot: dict[str, Any], g: dict[str, Any]) -> str:
    who = "" if g["api"] == bot["bot"] else f" of bot {g['api']}"
    line = f"gateway{who}: last getUpdates {str(g['polled_at'] or 'never')[:19]}, {g['waiting']} updates are not done"
    line += f", {g['repeated']} were in hand when a process ended and handed out again, {g['set_aside']} set aside"
    if g["conflicts"]:
        line += f"; SOMEBODY ELSE POLLED {g['conflicts']} times, last {str(g['conflict_at'])[:19]}"
    if g["webhook"]:
        line += f"; WEBHOOK at {g['webhook']}: polling is refused (--delete-webhook)"
    return clean(line)


def _fleets(bots: list[dict[str, Any]]) -> list[str]:
    """A line for each fleet: there may be thousands of bots in it."""
    out = []
    for fleet in sorted({b["fleet"] for b in bots if b["fleet"] is not None}):
        its = [b for b in bots if b["fleet"] == fleet]
        have = sum(1 for b in its if b["lease"]["holder"])
        paused = sum(1 for b in its if b["paused"])
        line = f"{clean(fleet)}: a fleet of {len(its):,} bots, {have:,} have a member"
        out.append(line + (f", {paused:,} paused" if paused else "") + " (status --name BOT, --json)")
    return out


def table(bots: list[dict[str, Any]]) -> str:
    """The status as text, columns as wide as they must be."""
    if not bots:
        return "no bot has registered in this database yet"
    out = _fleets(bots)
    for bot in bots:
        if bot["fleet"] is not None and len(bots) > 1:
            continue  # one line is for all of them; asked for by name it has its own
        lease = bot["lease"]
        holder = lease["holder"] if lease else None
        head = f"{clean(bot['bot'])}: "
        head += (
            clean(f"term {lease['term']}, held by {holder}, renewed {lease['renewed_at']}")
            if holder
            else "nobody holds the lease"
        )
        if bot["paused"]:
            head += "; PAUSED (botlease resume)"
        elif (
            not holder
            and bot["fleet"] is None
            and bot["instances"]
            and not any(i["is_active"] for i in bot["instances"])
        ):
            head += ", and nobody has the assignment (botlease promote INSTANCE, or deploy anew)"
        out.append(head)
        step = bot["handover"]
        if step is not None:
            out.append(f"handover {step['step']}: {clean(step['from'])} -> {clean(step['to'])}")
        if bot["quarantine"]:
            out.append(f"in quarantine, did not pass their probation: {clean(', '.join(map(str, bot['quarantine'])))}")
        out += [_gateway(bot, g) for g in bot["gateway"]]
        rows: list[tuple[str, ...]] = [
            ("", "INSTANCE", "STATE", "TERM", "GENERATION", "DEPLOYMENT", "HOST", "PID", "STARTED", "HEARTBEAT")
        ]
        for i in bot["instances"]:
            state = f"silent ({i['state']})" if i["silent"] and i["state"] != "stopped" else i["state"]
            cells = (i["instance_id"], state, i["term"], i["generation"], i["deployment"], i["host"], i["pid"])
            times = (str(i["started_at"])[:19], str(i["last_heartbeat"])[:19])
            shown = ("-" if c is None else clean(c) for c in cells + times)
            rows.append(("*" if i["is_active"] else " ", *shown))
        out += align(rows)
    out.append("(* is_active: this one should run)")
    return "\n".join(out)
