"""The Bot API gateway inside a Python program: ``async with botlease.gateway(term) as url``."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from botlease import clock, settings
from botlease.keeper import log
from botlease.stores.inbox import Holding, open_inbox
from botlease.telegram.address import served, serving
from botlease.telegram.gateway import Gateway
from botlease.text import safe

if TYPE_CHECKING:
    from botlease.inside import Term


def _say(text: str) -> None:
    log.warning("%s", safe(text))


class gateway:
    """Serve the Bot API on loopback for the body of an ``async with``, within a term.

    Gives the address to use as the framework's base URL. The hooks of :mod:`botlease.telegram` find it by themselves in
    this task and those that it starts; elsewhere pass it as ``url``. The rules are those of ``botlease run --gateway``.
    When the term ends early nothing is handed out any more, the body may finish what it has in hand, and then it is
    cancelled.

    Args:
        term: what ``botlease.active`` or ``botlease.exclusive`` gave.
        bot_api: your own Bot API server. Default: ``BOTLEASE_BOT_API``, or https://api.telegram.org.
        delete_webhook: delete a webhook that keeps the bot from polling, instead of naming it.

    Raises:
        ConfigurationError: an address that cannot be one. OSError: no port of 127.0.0.1 is to be had.
    """

    def __init__(self, term: Term, *, bot_api: str | None = None, delete_webhook: bool = False) -> None:
        if getattr(term, "work", None) is None:
            raise TypeError("botlease.gateway needs the term that botlease.active or botlease.exclusive gave")
        upstream = settings.bot_api(bot_api or os.environ.get("BOTLEASE_BOT_API") or settings.BOT_API)
        self._term = term
        self._gateway = Gateway(upstream, open_inbox(term.database), _say, delete_webhook=delete_webhook)

    async def __aenter__(self) -> str:
        term, work = self._term, self._term.work
        if work.on_arm is not None:
            raise RuntimeError("this term has a gateway already: one serves any number of tokens")
        url = await self._gateway.listen()
        self._before, self._url = served.set(url), url
        serving.append(url)
        self._gateway.begin(Holding(term.bot, term.number, work.nonce), work.until)
        work.on_arm, work.settle = self._gateway.arm, self._gateway.drain
        return url

    async def __aexit__(self, *error: object) -> None:
        work = self._term.work
        work.on_arm = work.settle = None
        with contextlib.suppress(ValueError):  # left in another task than it was entered in
            served.reset(self._before)
        serving.remove(self._url)
        try:
            # at the end of trust there is no time left, and the kernel's timer would end the whole program
            async with asyncio.timeout(max(0.0, work.until - clock.now() - 0.1)):
                await self._gateway.finish(clean=error[0] is None)
        except TimeoutError:
            pass
        except Exception as e:
            log.warning("the gateway could not be finished: %s", type(e).__name__)
        finally:  # whatever happens: nothing leaves after this
            self._gateway.end()
            await self._gateway.close()
