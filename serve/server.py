"""The server: uvicorn, with limits of time on what clients do, and an end that tells them.

In: an ASGI application and a listening socket. Out: responses, until Ctrl-C, a signal or `stop`. Knows no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.serve import left_out
from pocketlm.signals import handled

with left_out.imports():
    # the first three are chosen by their names at run time: these lines put them into a packed program
    import anyio._backends._asyncio  # noqa: F401
    import uvicorn.lifespan.off
    import uvicorn.loops.asyncio  # noqa: F401
    from uvicorn.config import Config
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import Server as Uvicorn

HEAD_BYTES = 16 << 10  # of a request's head
HEAD_SECONDS = 10.0  # from a connection, or from the last answer on it, until the head of the next request is there
STALL_SECONDS = 60.0  # that a reader may take nothing
CONNECTIONS = 768  # at the same time
AT_ONCE = 32  # connections that are accepted before the loop goes on with others
FILES = CONNECTIONS + 4 * AT_ONCE + 64  # handles: of those that come and go at the moment, and of other files, too
BACKLOG = 1024  # connections that the system keeps until they are accepted
STOP_SECONDS = 10  # for answers to end once the server stops


class Protocol(H11Protocol):
    """One connection. It is closed if the client is too slow to send the head of a request, or to read the response; and, where
    there are too many, if it has kept the server waiting longest, those first of which nothing was asked.
    """

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _heard = 0.0  # when it sent something, or was answered

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing is paused wherever the reader has not taken all
        self._await_head()
        assert self.limit_concurrency is not None
        if len(self.connections) >= self.limit_concurrency:
            others: Any = self.connections - {self}
            waiting = [one for one in others if not one._is_asked() or one.cycle.more_body or one.flow.write_paused]
            if waiting:  # else this one is told that there are too many
                longest = min(waiting, key=lambda one: (one._is_asked() or one.flow.write_paused, one._heard))
                longest.transport.abort()
                self.connections.discard(longest)

    def _is_asked(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        """The head of the next request has to come now: once the response before it is read."""
        self._heard = self.loop.time()
        self._end(self._head)
        if not self.flow.write_paused:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # asyncio's loop for Windows still hands over what had come by then
            return
        self._heard = self.loop.time()
        super().data_received(data)
        if self._is_asked():
            self._end(self._head)
            if not self.cycle.more_body and len(self.conn.trailing_data[0]) < HEAD_BYTES:
                self.flow.resume_reading()  # of what comes too early: else nobody sees that the client hangs up

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()
        if self._is_asked():  # for what had come meanwhile
            self._end(self._head)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. If it is in the body of a request, whoever answers that is told that the client is gone; if
        a response has begun, the connection is closed instead."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started:
            self.transport.close()
            return
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(sys.maxsize)

    def _await_reader(self, before: int) -> None:
        """Look now and then whether the reader takes anything. `before`: how many bytes waited for him then."""
        waiting = self.transport.get_write_buffer_size()
        if waiting < before:
            self._stall = self.loop.call_later(STALL_SECONDS, self._await_reader, waiting)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        self._end(self._stall)
        super().resume_writing()
        if not self._is_asked():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(self._head)
        self._end(self._stall)
        super().connection_lost(exc)

    @staticmethod
    def _end(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


class Server(Uvicorn):
    """`stopping` is called in the event loop when the server begins to stop: it has to end the answers."""

    def __init__(self, app: Any, listening: socket.socket, stopping: Callable[[], object]):
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).setLevel(logging.ERROR)
        config = Config(
            app, http=Protocol, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
            server_header=False, date_header=True, limit_concurrency=_most_connections(), backlog=AT_ONCE, proxy_headers=False,
            h11_max_incomplete_event_size=HEAD_BYTES, timeout_keep_alive=int(HEAD_SECONDS) or 1,
            timeout_graceful_shutdown=int(STOP_SECONDS) + 5, interface="asgi3",
        )  # fmt: skip
        super().__init__(config)
        self._stopping, self._listening = stopping, listening

    def serve_until_stopped(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop`, SIGINT or SIGTERM; a second signal ends without waiting for answers. `ready` is called once it
        listens.
        """
        asyncio.run(self._run(ready))

    async def _run(self, ready: Callable[[], object]) -> None:
        beginning = asyncio.ensure_future(self._announce(ready))
        try:
            await self.serve(sockets=[self._listening])
        finally:
            beginning.cancel()

    async def _announce(self, ready: Callable[[], object]) -> None:
        while not self.started:
            await asyncio.sleep(0.005)
        self._listening.listen(BACKLOG)
        ready()

    def stop(self) -> None:
        """Stop the server; from any thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end first. Who is still sending a request is not waited for, and who reads not for long."""
        self._stopping()
        connections: Any = list(self.server_state.connections)
        for connection in connections:
            if connection.cycle is not None and connection.cycle.more_body:
                connection.transport.close()
        clock = asyncio.get_running_loop().call_later(STOP_SECONDS, self._abort)
        await super().shutdown(sockets)
        clock.cancel()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def capture_signals(self) -> Any:
        """Let signals stop the server, but not the process: uvicorn would raise them once more afterwards."""
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if sys.platform == "win32" else [])]
        return handled(numbers, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at the second signal, without waiting for answers."""
        self.force_exit |= self.should_exit
        self.should_exit = True


def _most_connections() -> int:
    """As many as there can be file handles for: without one, asyncio goes on trying to accept, and tells each time."""
    with contextlib.suppress(ImportError, OSError):  # Windows has no such limit; a sandbox does not say
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < FILES:  # macOS gives 256, and more to who asks
            soft = min(FILES, hard) if hard >= 0 else FILES
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return max(AT_ONCE, CONNECTIONS - (FILES - soft))
    return CONNECTIONS


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any that is free; "::": by IPv4, too, where the system can. Raises UsageError for an address
    that is not this computer's, PocketlmError for a port that is taken.
    """
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (socket.gaierror, UnicodeError, OverflowError):
        raise UsageError(f"--host {host}: is no address of this computer") from None
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES) or os.name == "nt":
            taken = "is taken by another program" if error.errno == errno.EADDRINUSE else "may not be used"
            raise PocketlmError(f"port {port} {taken}; choose another one with --port, or any with --port 0") from None
        raise UsageError(f"--host {host}: {error.strerror or error}") from None


def address_for_others(host: str) -> str:
    """The address at which other computers reach a server that listens on all of them; "" if there is no network."""
    for documentation in ("2001:db8::1", "192.0.2.1")[":" not in host :]:
        family = socket.AF_INET6 if ":" in documentation else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((documentation, 9))  # sends nothing: the system says from where it would
            address = asked.getsockname()[0]
            return f"[{address}]" if ":" in address else address
    return ""
