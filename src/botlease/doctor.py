"""``botlease doctor``: what is not as it should be, here and now. It changes nothing.

Each check says what it found, and where that is not good, what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from botlease import __version__, settings
from botlease.platforms import PLAIN, SYSTEMD, grace
from botlease.settings import ConfigurationError, Settings
from botlease.stores import SCHEMA_VERSION, StoreError, open_store
from botlease.text import BOT_TOKEN, redact

CLOCK_OFF = 2.0
"""Seconds. Nothing safe depends on it; ages on displays do."""
SLOW = 0.25
"""Of one attempt: a database this slow leaves no room for a hiccup."""


@dataclass(frozen=True, slots=True)
class Line:
    level: Literal["ok", "warning", "problem"]
    what: str
    cure: str = ""


def ok(what: str) -> Line:
    return Line("ok", what)


async def examine(
    env: Mapping[str, str],
    *,
    database: str | None = None,
    name: str | None = None,
    telegram: bool = True,
    **options: Any,
) -> list[Line]:
    out = [ok(f"botlease {__version__}, Python {sys.version.split()[0]}")]
    out += machine()
    try:
        made = settings.make(env, database=database, name=name, **options)
    except ConfigurationError as e:
        return [*out, Line("problem", redact(str(e)), "correct it: `botlease run` would not start either")]
    out += platform_lines(made, env)
    out += tls_lines(made.database, env)
    out += await store_lines(made)
    if telegram:
        out += await telegram_lines(env)
    return [replace(line, what=redact(line.what)) for line in out]


# The machine ---------------------------------------------------------------------------------------------------------


def machine() -> list[Line]:
    """Whether the kernel has what the fence needs."""
    from botlease.work.fence import Fence

    out = []
    try:
        fence = Fence()
        if fence.kernel:
            out.append(ok("kernel fence: a timer that counts suspended time and needs nobody to be awake"))
        else:
            cure = "run it on Linux where money depends on it"
            out.append(Line("warning", f"kernel fence: {sys.platform} has no such timer; the stop is weaker", cure))
        fence.close()
    except OSError as e:
        out.append(Line("problem", f"kernel fence: {e}", "raise the limit of pending signals: ulimit -i"))
    if not Path("/proc/self/stat").exists():
        out.append(Line("warning", "no /proc: processes that daemonise cannot be found", "mount /proc"))
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        cure = "Linux 5.3 or newer, and a container profile that allows pidfd_open"
        out.append(Line("warning", "no pidfd: a dead holder of this machine is waited out for a ttl", cure))
    return out


def platform_lines(s: Settings, env: Mapping[str, str]) -> list[Line]:
    p = s.platform
    key = "made by hand: each start is a deployment of its own" if s.by_hand else f"deployment {s.deployment}"
    out = [ok(f"platform {p.name}: {key}")]
    if not s.by_hand and s.deployment.startswith("start:") and not p.deployment:
        what = "a new one stands by until the old one is stopped; BOTLEASE_DEPLOYMENT=... would take over"
        out[0] = ok(f"platform {p.name}: it does not name deployments: {what}")
    elif not s.by_hand and s.deployment.startswith("start:"):
        names = " or ".join(source for source, _ in p.deployment) or "--deployment"
        cure = f"make {names} known to the process"
        if p.name == "Heroku":
            cure = "heroku labs:enable runtime-dyno-metadata, and deploy again"
        out[0] = Line("warning", f"platform {p.name}: it does not name the deployment: a new one stands by", cure)
    if p.health_window:
        waits = f"/health waits up to {p.health_window:g} s for handover and probation"
        out.append(ok(f"health: {waits}; as the health check path it keeps the old one for as long"))
    elif p.health == "optional":
        out.append(ok("health: where it asks for one, give it --health-port and /readyz (never /leader)"))
    if s.barred:
        out.append(Line("problem", f"it would refuse to become active: {s.barred}", "see BOTLEASE_ENVIRONMENT"))
    elif p.environment and not env.get("BOTLEASE_ENVIRONMENT"):
        what = "a duplicated or preview environment with this token and a database of its own would run the bot, too"
        here = next((env[n] for n in p.environment if env.get(n)), "production")
        out.append(Line("warning", what, f"set BOTLEASE_ENVIRONMENT={here}"))
    has, needs = grace(p, env), s.timing.stop_grace + s.timing.kill_budget
    if p is PLAIN:
        out.append(ok(f"stop: give it {needs:g} s from SIGTERM to SIGKILL"))
    elif has < needs:
        told = any(env.get(name) for name in ("BOTLEASE_PLATFORM_GRACE", p.grace_variable) if name)
        kills = f"{p.name} kills {has:g} s after its {p.stop_signal}" + ("" if told else ", as far as can be told")
        most = f"{s.timing.stop_grace:g} s to stop and {s.timing.kill_budget:g} s to be killed"
        what = f"{kills}, and the bot may take {most}"
        cure = f"{p.grace_cure}; {needs:.0f} s are needed with this --stop-grace"
        if not p.grace_variable:
            cure += " (BOTLEASE_PLATFORM_GRACE says what you have set)"
        out.append(Line("warning", what, cure))
    else:
        out.append(ok(f"stop: {has:g} s from {p.stop_signal} to SIGKILL, {needs:g} s are needed"))
    return out


# The database --------------------------------------------------------------------------------------------------------


def tls_lines(url: str, env: Mapping[str, str]) -> list[Line]:
    """Without a checked certificate whoever is on the way can read the password and answer in the database's place."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or "localhost"
        mode = dict(parse_qsl(parts.query)).get("sslmode") or env.get("PGSSLMODE") or "prefer"
    except ValueError:
        return []
    inside = host in ("localhost", "127.0.0.1", "::1") or host.startswith("/") or host.endswith(".internal")
    if not parts.scheme.startswith("postgres") or inside or mode in ("verify-full", "verify-ca"):
        return []
    what = f"TLS to the database: sslmode is {mode}, so the server's certificate is not checked"
    cure = "add ?sslmode=verify-full&sslrootcert=FILE to the URL; no matter in a network of your own"
    return [Line("warning", what, cure)]


async def store_lines(s: Settings) -> list[Line]:
    try:
        store = open_store(s.database)
    except StoreError as e:
        return [Line("problem", str(e), "see BOTLEASE_DATABASE_URL and DATABASE_URL")]
    try:
        found = await store.diagnose(5.0)
    except StoreError as e:
        return [Line("problem", f"database: {e}", "check the URL, the network and the server")]
    finally:
        await store.aclose()
    out = [ok(f"database: {found['server']} at {store.url}, answers in {found['seconds'] * 1000:.1f} ms")]
    if found["seconds"] > s.timing.attempt * SLOW:
        cure = "bring bot and database closer together, or raise --ttl"
        out.append(
            Line("warning", f"one call may take {s.timing.attempt:g} s, and took {found['seconds']:.2f} s", cure)
        )
    if found["missing"]:
        files = s.database.startswith("sqlite:")
        cure = "check the permissions" if files else "GRANT it: docs/design.md, Privileges"
        who = "this user" if files else "the role"
        out.append(Line("problem", f"{who} lacks {', '.join(found['missing'])}", cure))
    elif found["schema"] is None:
        out.append(ok("tables: none yet, the first start makes them"))
    elif found["schema"] > SCHEMA_VERSION:
        out.append(Line("problem", f"tables: version {found['schema']} of a newer botlease", "upgrade this one"))
    else:
        later = "" if found["schema"] == SCHEMA_VERSION else ", the next start upgrades them"
        out.append(ok(f"tables: version {found['schema']}{later}"))
    if found["pooled"]:
        cure = "set BOTLEASE_DATABASE_URL to ${{Postgres.DATABASE_UNPOOLED_URL}} (Railway: the direct one), or leave it"
        slow = f"the holder hears of a change with its next renewal, up to {s.timing.renew_every:g} s later"
        out.append(Line("warning", f"a transaction pooler is in between, so there is no LISTEN: {slow}", cure))
    if abs(found["clock"]) > CLOCK_OFF:
        cure = "no lease depends on it; ages in status and history do: use NTP on both"
        out.append(Line("warning", f"clock: the database's is {found['clock']:+.1f} s from ours", cure))
    else:
        out.append(ok(f"clock: {found['clock'] * 1000:+.0f} ms between the database and us"))
    if s.database.startswith("sqlite:") and s.platform not in (PLAIN, SYSTEMD):
        what = f"SQLite guards one machine, and {s.platform.name} may give each deployment a disk of its own"
        out.append(Line("problem", what, "set DATABASE_URL to a PostgreSQL that all deployments share"))
    return out


# Telegram ------------------------------------------------------------------------------------------------------------


async def telegram_lines(env: Mapping[str, str]) -> list[Line]:
    token = next((env[v] for v in settings.TOKEN_VARIABLES if env.get(v)), None)
    if token is None:
        return []
    if not BOT_TOKEN.fullmatch(token):
        if BOT_TOKEN.fullmatch(token.strip()):
            what = "the Telegram token has a blank or a line end before or behind it"
            return [Line("problem", what, "copy it again without")]
        return [Line("problem", "the Telegram token is not one: digits, a colon, letters", "copy it from @BotFather")]
    base = (env.get("BOTLEASE_BOT_API") or env.get("TELEGRAM_API_URL") or settings.BOT_API).rstrip("/")
    try:
        me = await asyncio.to_thread(_call, base, token, "getMe")
        hook = await asyncio.to_thread(_call, base, token, "getWebhookInfo")
    except (OSError, ValueError) as e:
        return [Line("warning", f"Telegram: {_without(token, e)}", "check the network; --no-telegram skips this")]
    except Exception as e:  # what else a library raises may quote the address, and the token in it
        what = f"Telegram: {type(e).__name__} while asking the Bot API"
        return [Line("warning", what, "check BOTLEASE_BOT_API, TELEGRAM_API_URL; --no-telegram skips this")]
    if not me.get("ok"):
        cure = "get the current token from @BotFather"
        return [
            Line(
                "problem",
                f"Telegram refuses the token of bot {settings.token_id(env)}: {_without(token, _said(me))}",
                cure,
            )
        ]
    who, state = (found if isinstance(found := answer.get("result"), dict) else {} for answer in (me, hook))
    out = [ok(f"Telegram: the token is that of @{who.get('username', '?')} ({who.get('id')})")]
    url = str(state.get("url") or "")
    if url:
        cure = "a polling bot gets nothing until deleteWebhook; a webhook bot needs no polling"
        with contextlib.suppress(ValueError):
            url = str(urlsplit(url).hostname)
        out.append(Line("warning", f"Telegram: a webhook is set, to {_without(token, url)}", cure))
    else:
        out.append(ok(f"Telegram: no webhook, {state.get('pending_update_count', 0)} updates wait"))
    return out


def _without(token: str, text: object) -> str:
    """It may have been sent back to us in a form that does not look like one any more."""
    return redact(str(text).replace(token, "***"))


def _said(answer: dict[str, Any]) -> str:
    return str(answer.get("description", "no reason given"))


def _call(base: str, token: str, method: str) -> dict[str, Any]:
    """One call without parameters; an answer with an error status is an answer, too."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    if not base.startswith(("http://", "https://")):
        raise ValueError("BOTLEASE_BOT_API, or TELEGRAM_API_URL, must begin with http:// or https://")
    try:
        with urlopen(f"{base}/bot{token}/{method}", timeout=5) as answer:  # noqa: S310 - checked just above
            body = answer.read(1 << 20)
    except HTTPError as e:
        body = e.read(1 << 20)
    except URLError as e:
        raise OSError(f"{urlsplit(base).hostname} cannot be reached: {e.reason}") from None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError(f"{urlsplit(base).hostname} did not answer as a Bot API does") from None
    if not isinstance(found, dict):
        raise ValueError(f"{urlsplit(base).hostname} did not answer as a Bot API does")
    return found
