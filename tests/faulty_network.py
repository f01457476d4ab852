"""A TCP proxy that does to connections what networks do, from a seed and on demand.

TLS passes through it, so what it changes must be found by TLS; nothing here knows keys.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

KINDS = ("cut", "half-open", "100 B/s", "stall", "duplicate", "bit-flip")
_CHUNK = 16384
_PIECE = 10  # bytes at a time, at 100 a second


class Link:
    """One connection through the proxy: both ends, and whether anything still passes."""

    def __init__(self, ends: Sequence[asyncio.StreamWriter]) -> None:
        self.ends, self.deaf = ends, False

    def abort(self) -> None:
        """Reset both ends."""
        for end in self.ends:
            end.transport.abort()


class Proxy:
    """Passes TCP connections on to a port of this machine, with faults; runs in a thread.

    :meth:`inject` arms a fault, which befalls the next bytes that pass in either direction;
    :attr:`befell` counts those that did, by kind. While :meth:`down`, no connection lives.

    Args:
        upstream: The port to connect to.
        seed: Of which bit is flipped.
        stall: Seconds that a stall lasts.
        slow: Longest time in seconds that a connection is slow.
    """

    def __init__(
        self, upstream: int, seed: int = 0, stall: float = 30.0, slow: float = 15.0
    ) -> None:
        self.upstream, self.stall, self.slow = upstream, stall, slow
        self.befell: Counter[str] = Counter()
        self.port = 0
        self._draw = random.Random(seed)
        self._armed: list[str] = []
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None] | None] = set()  # asyncio itself forgets them
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def inject(self, kind: str) -> None:
        """Arm a fault of a kind in :data:`KINDS`."""
        self._armed.append(kind)

    @property
    def waiting(self) -> int:
        """How many faults are armed and have befallen nothing yet."""
        return len(self._armed)

    def down(self, down: bool) -> None:
        """Cut every connection and refuse others, or admit them again."""
        change = self._go() if down else self._listen()
        asyncio.run_coroutine_threadsafe(change, self._loop).result(10)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        return self._server.sockets[0].getsockname()[1]

    async def _go(self) -> None:
        self._server.close()
        for link in list(self._links):
            link.abort()

    async def _end(self) -> None:
        await self._go()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            there = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        link = Link((writer, there[1]))
        self._links.add(link)
        try:
            with suppress(asyncio.CancelledError):  # the proxy ends
                await asyncio.gather(
                    self._pump(reader, there[1], link), self._pump(there[0], writer, link)
                )
        finally:
            self._links.discard(link)
            link.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link
    ) -> None:
        """Pass bytes in one direction until an end closes."""
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                if self._armed and not link.deaf:
                    kind = self._armed.pop(0)
                    self.befell[kind] += 1
                    data = await self._befall(kind, data, sink, link)
                if not link.deaf and data:
                    sink.write(data)
                    await sink.drain()
        if link.deaf:
            await asyncio.Event().wait()  # the other end is not told
        link.abort()

    async def _befall(
        self, kind: str, data: bytes, sink: asyncio.StreamWriter, link: Link
    ) -> bytes:
        """Let a fault happen at ``data``; return what of it is still to be sent."""
        if kind == "cut":
            link.abort()
            return b""
        if kind == "half-open":
            link.deaf = True
        elif kind == "stall":
            await asyncio.sleep(self.stall)
        elif kind == "100 B/s":
            return await self._trickle(data, sink)
        elif kind == "duplicate":
            return data + data
        elif kind == "bit-flip":
            place, bit = self._draw.randrange(len(data)), self._draw.randrange(8)
            return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        return data

    async def _trickle(self, data: bytes, sink: asyncio.StreamWriter) -> bytes:
        for _ in range(int(self.slow * 100 / _PIECE)):
            piece, data = data[:_PIECE], data[_PIECE:]
            if not piece:
                break
            sink.write(piece)
            await sink.drain()
            await asyncio.sleep(_PIECE / 100)
        return data
