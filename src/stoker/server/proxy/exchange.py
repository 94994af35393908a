"""One request and its response, on their way through."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from stoker.errors import DeadlineExceeded, GuestError, HostError, InvalidRequest, StokerError
from stoker.server.proxy import heads
from stoker.server.proxy.heads import BadHead, Head, Headers
from stoker.server.proxy.pages import page, status_of

if TYPE_CHECKING:
    from stoker.server.proxy.front import Front
    from stoker.server.proxy.pool import Pool, Upstream
    from stoker.server.proxy.router import Target

__all__ = ["Exchange"]

READY: Final = 60.0
"""Seconds that a request waits for its sandbox (paused, and taken up again) and its service."""
RESPONSE: Final = 300.0
"""Seconds until a service must have begun to answer."""
BUFFER: Final = 64 << 10
REPEATABLE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))


class Exchange:
    """Made when a request begins; :meth:`start` when it is its turn."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.url = b""
        self.method = b""
        self.version = "1.1"
        self.headers: Headers = []
        self.trailers: Headers = []
        self.head = Head()
        self.failure: StokerError | None = None
        self.in_head = True
        self.head_bytes = 0
        self.received_all = False
        self.sent_all = False
        """The whole request is with the service."""
        self.started = False
        self.ended = False
        self.responded = False
        self.chunked_out = False
        self.close = False
        self._target: Target | None = None
        self._body: list[bytes] = []
        self._waiting = 0
        self._body_sent = False
        self._up: Upstream | None = None
        self._task: asyncio.Task[None] | None = None

    # -- the request ------------------------------------------------------------------------------------------------------------

    def judged(self, method: bytes, version: str) -> None:
        """The head is complete."""
        self.in_head = False
        self.method, self.version = method, version
        try:
            self.head = heads.judge(self.headers, version, request=True)
            self.received_all = not self.has_body
            self.close = self.head.close
            self.url = heads.target_of(self.url, self.head)
            if method == b"CONNECT":
                raise BadHead(405, "CONNECT is not for this proxy")
        except BadHead as bad:
            self.fail_with(bad)

    @property
    def has_body(self) -> bool:
        return self.head.chunked or bool(self.head.length)

    def fail_with(self, bad: BadHead) -> None:
        self.failure = _Refused(bad.status, bad.why)
        self.close = True

    def start(self) -> None:
        """It is its turn: nothing of an earlier response is to be written any more."""
        self.started = True
        if self.failure is not None:
            self.answer(self.failure)
            return
        try:
            self._target = self.front.router.find(self.head, self.headers)
        except BadHead as bad:
            self.close = True
            self.answer(_Refused(bad.status, bad.why))
            return
        except StokerError as error:
            self.answer(error)
            return
        pool = self._target.pool
        up = pool.take()
        if up is not None:
            self._attach(up)
        else:
            self._connect(pool)

    def _connect(self, pool: Pool) -> None:
        self._task = asyncio.get_running_loop().create_task(self._connected(pool))

    async def _connected(self, pool: Pool) -> None:
        try:
            async with asyncio.timeout(READY):
                up = await pool.connect()
        except TimeoutError:
            self.answer(HostError("wake_timeout", f"the sandbox was not ready within {READY:g} s", "try again"))
        except StokerError as error:
            self.answer(error)
        else:
            self._task = None
            if self.ended:
                pool.put(up)
            else:
                self._attach(up)

    def _attach(self, up: Upstream) -> None:
        self._up = up
        up.begin(self)
        front, target = self.front, self._target
        assert target is not None
        head = heads.request_head(
            self.method,
            self.url,
            target.headers,
            self.head,
            client=front.client,
            proto="http",
            trusted=front.trusted,
            without=target.without,
        )
        front.deadline = front.now() + RESPONSE
        body, self._body, self._waiting = self._body, [], 0
        self._body_sent = bool(body)
        self.sent_all = self.received_all
        up.wire.write(b"".join((head, *body)))
        front.go_on("body")

    def body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self.ended or self.failure is not None:
            return
        self._send(heads.chunk(data) if self.head.chunked else data)

    def end(self) -> None:
        """The request is complete."""
        self.received_all = True
        if self.ended or self.failure is not None:
            return
        if self.head.chunked:
            self._send(heads.trailers(self.trailers))
        self.sent_all = self._up is not None

    def _send(self, data: bytes) -> None:
        if self._up is not None:
            self._body_sent = True
            self._up.wire.write(data)
            if not self.responded:
                self.front.deadline = self.front.now() + RESPONSE
            return
        self._body.append(data)
        self._waiting += len(data)
        if self._waiting > BUFFER:
            self.front.hold("body")

    # -- the response -----------------------------------------------------------------------------------------------------------

    def response_head(self, status: int, reason: bytes, headers: Headers, head: Head, *, bodiless: bool) -> None:
        front = self.front
        modern = self.version == "1.1"
        if status < 200 and status != 101:
            if modern:
                front.out.append(heads.response_head(status, reason, headers, head, chunked=False, close=False, bodiless=True))
            return
        self.responded = True
        front.deadline = None
        self.chunked_out = modern and not bodiless and head.length is None
        if not modern and not bodiless and head.length is None:
            self.close = True
        if not self.front.accepting:
            self.close = True
        front.out.append(
            heads.response_head(
                status, reason, headers, head, chunked=self.chunked_out, close=self.close, bodiless=bodiless, old=not modern
            )
        )
        if status == 101:
            front.out_tunnel(self)

    def response_body(self, data: bytes) -> None:
        self.front.out.append(heads.chunk(data) if self.chunked_out else data)

    def response_end(self, trailers: Headers) -> None:
        if self.chunked_out:
            self.front.out.append(heads.trailers(trailers))

    def finish(self) -> None:
        """The response is written."""
        if not self.ended:
            self.ended = True
            self._up = None
            self.front.finished(self)

    # -- what goes wrong --------------------------------------------------------------------------------------------------------

    def answer(self, error: StokerError) -> None:
        """In the service's place."""
        if self.ended:
            return
        if self.responded:
            self.front.abort()  # half a response cannot be taken back: its reader has to see that it is not whole
            return
        if not self.received_all:
            self.close = True
        self.responded = True
        status = error.answer if isinstance(error, _Refused) else status_of(error)
        self.front.out.append(page(status, error, self.headers, head_only=self.method == b"HEAD", close=self.close))
        self.front.flush()
        self.finish()

    def broken(self, error: StokerError) -> None:
        """The service said what cannot be sent on."""
        up, self._up = self._up, None
        if up is not None:
            up.abort()
        self.front.out.clear()
        self.answer(error)

    def broken_request(self, bad: BadHead) -> None:
        """The rest of its body is not understood."""
        self.fail_with(bad)
        if self.started:
            self.broken(_Refused(bad.status, bad.why))

    def lost(self, up: Upstream, error: Exception | None) -> None:
        """The connection to the service is gone before the end of its response."""
        self._up = None
        if self.ended:
            return
        if up.reused and not self.responded and not self._body_sent and self.method in REPEATABLE:
            # It was closed while it rested, as this request was on its way: nobody has seen it.
            assert self._target is not None
            self._connect(self._target.pool)
            return
        if isinstance(error, StokerError):
            self.answer(error)
            return
        how = "in the middle of its answer" if self.responded else "without an answer"
        self.answer(GuestError("service_closed", f"the service closed the connection {how}", "look at its log"))

    def too_late(self) -> None:
        """The service has not begun to answer in time."""
        up, self._up = self._up, None
        if up is not None:
            up.abort()
        self.answer(DeadlineExceeded("response_timeout", f"the service did not answer within {RESPONSE:g} s"))

    def give_up(self) -> None:
        """The client is gone."""
        self.ended = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        up, self._up = self._up, None
        if up is not None:
            up.abort()

    # -- a tunnel ---------------------------------------------------------------------------------------------------------------

    def to_service(self, data: bytes) -> None:
        if self._up is not None:
            self._up.wire.write(data)

    def end_to_service(self) -> None:
        if self._up is not None:
            self._up.wire.write_eof()

    def service_pauses(self, pause: bool) -> None:
        """The client does not keep up, or does again."""
        if self._up is not None:
            (self._up.wire.pause_reading if pause else self._up.wire.resume_reading)()


class _Refused(InvalidRequest):
    """A request that is not understood."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__("bad_request", why)
        self.answer = status
