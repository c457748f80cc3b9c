"""Global and per-host rate limits: concurrent requests per host, a pause between them, concurrent requests overall."""

import asyncio
from collections import defaultdict
from collections.abc import Callable


class _Host:
    def __init__(self, places: int, pause: float) -> None:
        self.places = asyncio.Semaphore(places)
        self.pause = pause
        self.next = 0.0


class Turns:
    """At most ``places`` concurrent requests, ``per_host`` per host, with ``pause`` seconds between starts at a host.

    While ``paused()`` is true no request starts.
    """

    def __init__(self, places: int, per_host: int, pause: float, paused: Callable[[], bool]) -> None:
        self._places = asyncio.Semaphore(places)
        self._hosts: defaultdict[str, _Host] = defaultdict(lambda: _Host(per_host, pause))
        self._paused = paused

    def slow_down(self, host: str, pause: float) -> None:
        """Keep requests to ``host`` at least ``pause`` seconds apart from now on."""
        self._hosts[host].pause = max(self._hosts[host].pause, pause)

    async def take(self, host: str) -> None:
        """Wait for a turn at ``host``; the caller returns it by :meth:`release`."""
        entry = self._hosts[host]
        await entry.places.acquire()
        try:
            await _wait_for_moment(entry)
            await self._take_place()
        except BaseException:
            entry.places.release()
            raise

    def release(self, host: str) -> None:
        """Return a turn at ``host``."""
        self._places.release()
        self._hosts[host].places.release()

    async def _take_place(self) -> None:
        await self._places.acquire()
        try:
            while self._paused():
                await asyncio.sleep(0.01)
        except BaseException:
            self._places.release()
            raise


async def _wait_for_moment(entry: _Host) -> None:
    if entry.pause:
        now = asyncio.get_running_loop().time()
        moment = max(now, entry.next)
        # Reserve the next start before waiting, so that concurrent waiters start at different times.
        entry.next = moment + entry.pause
        await asyncio.sleep(moment - now)
