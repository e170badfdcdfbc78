"""What people may be shown: without secrets, and without what a terminal would obey."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import unquote, urlsplit

TOKEN: Final = re.compile(r"(?<!\d)(\d{5,}):[A-Za-z0-9_-]{20,}")
"""What looks like a bot token, wherever it stands."""
BOT_TOKEN: Final = re.compile(r"[0-9]{3,20}:[A-Za-z0-9_-]{1,80}")
"""The whole of a token of Telegram's."""
_HOSTS: Final = re.compile(r"((\[[0-9A-Fa-f:.]+\]|[\w.-]*)(:\d+)?,?)*", re.ASCII)
_WORD: Final = re.compile(r"[\w./%@+-]*", re.ASCII)
_PARAMETER: Final = re.compile(r"(?i)((?:password|passwd|pwd)\s*=\s*)('[^']*'|\"[^\"]*\"|[^&\s]+)")
LONGEST: Final = 4096
"""Characters of a line of ours, or of a cell: no path is longer. Rows can be written by anybody, of any length."""


def clean(text: Any) -> str:
    """Rows, and what a server says, can be written by anybody: no control characters may reach the terminal."""
    text = str(text)
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def redact(text: str) -> str:
    """Blot out passwords of URLs and bot tokens in anything that people may see."""
    if len(text) <= 2 * LONGEST:
        return _blotted(text)
    # The patterns would not be done with a megabyte: a supervisor that wants to say it neither renews nor stops. What
    # the cut leaves of a secret at its end no pattern knows, so the last part of what was looked at is not shown.
    return _blotted(text[: 2 * LONGEST])[:-LONGEST] + "..."


def _blotted(text: str) -> str:
    # up to the last @ before white space: a password may hold one itself
    text = re.sub(r"(?<=://)([^/@\s:]*):\S*(?=@)", r"\1:***", text)
    text = _PARAMETER.sub(r"\1***", text)
    return TOKEN.sub(r"\1:***", text)


def safe(text: object) -> str:
    """For one line of ours: both."""
    return clean(redact(str(text)))


def passwords(url: str) -> list[str]:
    """Every spelling of a password that this URL may hold, for blotting it out elsewhere."""
    found = [url.partition("://")[2].rpartition("@")[0].partition(":")[2]]
    for pair in url.partition("?")[2].split("&"):
        key, _, value = pair.partition("=")
        if re.search("(?i)password|passwd|pwd", unquote(key)):
            found.append(value)
    found += [m[2].strip("'\"") for m in _PARAMETER.finditer(url)]
    # urlsplit, and so the driver, leaves these out
    found += [re.sub(r"[\t\r\n]", "", word) for word in found]
    return sorted({p for word in found for p in (word, unquote(word)) if p}, key=len, reverse=True)


def shown(url: str) -> str:
    """A database URL for people: put together anew from what cannot be a password, never edited."""
    try:
        parts = urlsplit(url)
        user, _, hosts = parts.netloc.rpartition("@")
    except ValueError:
        return "a URL that is none"
    user = user.partition(":")[0]
    rest = parts.path + parts.query + parts.fragment
    # an @ behind the hosts: what stands before it was a password with a slash, a question mark or a hash in it
    odd = "@" in rest and not parts.netloc.rpartition("@")[1]
    if parts.scheme == "sqlite":
        return clean(url)
    if odd or not all((_HOSTS.fullmatch(hosts), _WORD.fullmatch(user), _WORD.fullmatch(parts.path))):
        return f"{parts.scheme}://***" if parts.scheme in ("postgres", "postgresql") else "a URL that is none"
    return f"{parts.scheme}://{user + '@' if user else ''}{hosts}{parts.path}{'?...' if parts.query else ''}"
