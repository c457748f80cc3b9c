"""robots.txt by RFC 9309: fetched once per host before the first request, cached for a day.

* 2xx: the rules apply (section 2.2; parsed by protego). The first 500 KiB are read, the rest is ignored (2.5).
* 4xx except 429, or more than five redirects: no rules (2.3.1.2, 2.3.1.3).
* 5xx, 429, no answer: all urls are forbidden (2.3.1.4) for a minute; then robots.txt is fetched again.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protego import Protego
from yarl import URL

from pipeline.stages.crawl.failure import Failure

PRODUCT = "clipmill"
MAX_BYTES = 500 * 1024
_KEPT_SECONDS = 24 * 3600.0
_FAILURE_SECONDS = 60.0
_ENTRIES = 100_000
_AGENT_LINE = re.compile(r"\s*user[- ]?agent\s*:?\s*([^#]*)", re.IGNORECASE)

Get = Callable[[URL], Awaitable[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Rules of a host; ``parsed`` is None without rules; ``failure`` is the reason where they are unreadable."""

    parsed: Protego | None
    failure: str | None
    expires: float


# The rules of a host are shared by all shards of a worker; a running request belongs to one event loop.
_kept: dict[tuple[str, str], _Rules] = {}


class Robots:
    """Fetches each host's rules once, and applies them.

    ``get`` fetches a url and returns its status and at most ``MAX_BYTES`` of its body; it raises ``Failure``. ``token``
    is the crawler's name, ``max_delay`` the upper limit in seconds for the ``Crawl-delay``.
    """

    def __init__(self, get: Get, token: str | None, max_delay: float) -> None:
        self._get, self._agent, self._max_delay = get, (token or PRODUCT).lower(), max_delay
        self._under_way: dict[str, asyncio.Task[_Rules]] = {}

    async def check(self, url: URL) -> float:
        """The Crawl-delay in seconds of the host of ``url``, 0 for none.

        Raises:
            Failure: "robots" where the rules forbid ``url``, "robots_unreachable" where they are unreadable.
        """
        rules = await self._rules(url)
        if rules.failure is not None:
            raise Failure("robots_unreachable", f"robots.txt could not be read ({rules.failure})")
        if rules.parsed is None:
            return 0.0
        if not rules.parsed.can_fetch(str(url), self._agent):
            raise Failure("robots", "disallowed by robots.txt")
        delay = rules.parsed.crawl_delay(self._agent) or 0.0
        # A comparison with "nan" is false, so it means no delay.
        return min(delay, self._max_delay) if delay > 0 else 0.0

    async def close(self) -> None:
        """Cancel running requests."""
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def _rules(self, url: URL) -> _Rules:
        origin = str(url.origin())
        rules = _kept.get((origin, self._agent))
        if rules is not None and rules.expires > time.monotonic():
            return rules
        task = self._under_way.get(origin)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(url.origin(), origin))
            self._under_way[origin] = task
            task.add_done_callback(lambda _: self._under_way.pop(origin, None))
        # A cancelled row must not cancel the request for other waiting rows.
        return await asyncio.shield(task)

    async def _fetch(self, site: URL, origin: str) -> _Rules:
        try:
            status, body = await self._get(site.with_path("/robots.txt"))
            rules = await self._understood(status, body)
        except Failure as failure:
            if failure.error_class == "too_many_redirects":
                rules = _Rules(None, None, time.monotonic() + _KEPT_SECONDS)
            else:
                rules = _Rules(None, failure.message, time.monotonic() + _FAILURE_SECONDS)
        if len(_kept) >= _ENTRIES:
            _kept.clear()
        _kept[origin, self._agent] = rules
        return rules

    async def _understood(self, status: int, body: bytes) -> _Rules:
        if status == 429 or status >= 500:
            return _Rules(None, f"HTTP Error {status}", time.monotonic() + _FAILURE_SECONDS)
        kept_until = time.monotonic() + _KEPT_SECONDS
        if not 200 <= status < 300:
            return _Rules(None, None, kept_until)
        return _Rules(await asyncio.to_thread(parse_rules, body, self._agent), None, kept_until)


def parse_rules(body: bytes, agent: str) -> Protego:
    """The rules of ``body`` (UTF-8) for ``agent`` or for all agents.

    Other agents are replaced by one name: otherwise the cost of a file with ten thousand agents and ten thousand rules
    would be their product.
    """
    lines = body.decode("utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    return Protego.parse("\n".join(_anonymous(line, agent) for line in lines))


def _anonymous(line: str, agent: str) -> str:
    match = _AGENT_LINE.match(line)
    if match is None:
        return line
    name = match[1].strip().lower().strip("*")
    return line if not name or name in agent else "User-agent: -"
