"""What the database says, for people and for scripts. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

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


def _time(value: Any) -> Any:
    return value.isoformat(sep=" ", timespec="milliseconds") if isinstance(value, datetime) else value


def by_bot(overview: dict[str, Any], *, ended: bool = False) -> list[dict[str, Any]]:
    """One dictionary for each bot, in the documented form. Ended instances are history: left out unless asked."""
    bots: dict[str, dict[str, Any]] = {}
    for row in overview["leases"]:
        lease = {k: _time(row[k]) for k in ("term", "beat", "holder", "ttl", "renewed_at")}
        bots[row["bot"]] = {"bot": row["bot"], "lease": lease, "instances": []}
    for row in overview["instances"]:
        if row["bot"] is None or (row["ended_at"] is not None and not ended and not row["is_active"]):
            continue  # rows of an earlier system have no bot
        entry = bots.setdefault(row["bot"], {"bot": row["bot"], "lease": None, "instances": []})
        instance = {name: _time(row[name]) for name in FIELDS}
        lease = entry["lease"]
        if lease is not None and lease["holder"] == row["instance_id"]:
            # The holder's heartbeat is its renewal; its own row is touched once a ttl only.
            instance["last_heartbeat"] = max(str(instance["last_heartbeat"]), str(lease["renewed_at"]))
        entry["instances"].append(instance)
    return list(bots.values())


def clean(text: Any) -> str:
    """Rows can be written by anybody: no control characters may reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def table(bots: list[dict[str, Any]]) -> str:
    """The status as text, columns as wide as they must be."""
    if not bots:
        return "no bot has registered in this database yet"
    out = []
    for bot in bots:
        lease = bot["lease"]
        holder = lease["holder"] if lease else None
        head = f"{clean(bot['bot'])}: "
        head += (
            f"term {lease['term']}, held by {clean(holder)}, renewed {lease['renewed_at']}"
            if holder
            else "nobody holds the lease"
        )
        out.append(head)
        rows: list[tuple[str, ...]] = [
            ("", "INSTANCE", "STATE", "TERM", "GENERATION", "DEPLOYMENT", "HOST", "PID", "STARTED", "HEARTBEAT")
        ]
        for i in bot["instances"]:
            cells = (i["instance_id"], i["state"], i["term"], i["generation"], i["deployment"], i["host"], i["pid"])
            times = (str(i["started_at"])[:19], str(i["last_heartbeat"])[:19])
            shown = ("-" if c is None else clean(c) for c in cells + times)
            rows.append(("*" if i["is_active"] else " ", *shown))
        widths = [max(len(r[n]) for r in rows) for n in range(len(rows[0]))]
        out += ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    out.append("(* is_active: this one should run)")
    return "\n".join(out)
