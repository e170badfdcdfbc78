"""The arguments of a Bot API call, in every form in which frameworks send them: query, JSON, form, multipart."""

from __future__ import annotations

import email.parser
import email.policy
import json
from typing import Any
from urllib.parse import parse_qsl


def arguments(query: str, content_type: str, body: bytes) -> dict[str, Any]:
    """Raises ValueError for JSON that is none."""
    args: dict[str, Any] = dict(parse_qsl(query))
    if body and content_type.startswith("application/json"):
        loaded = json.loads(body)
        args |= loaded if isinstance(loaded, dict) else {}
    elif body and content_type.startswith("multipart/form-data"):
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        for part in form.iter_parts():
            name = part.get_param("name", header="content-disposition")
            if name:
                args[str(name)] = (part.get_payload(decode=True) or b"").decode(errors="replace")  # type: ignore[union-attr]
    elif body:
        args |= dict(parse_qsl(body.decode(errors="replace")))
    if isinstance(args.get("allowed_updates"), str):
        try:
            args["allowed_updates"] = json.loads(args["allowed_updates"])
        except ValueError:
            del args["allowed_updates"]
    return args


def integer(value: Any, default: int) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return default
