"""bittensor's Dendrite, made fit for machines without internet and for validators that mean no good."""

from __future__ import annotations

import collections
import uuid
from collections.abc import Callable

import aiohttp
import bittensor as bt

from neurons.miner.clock import steady_time

# Called with a validator's hotkey, the Date header of its answer, and our time at the request and at the answer.
DateListener = Callable[[str, str | None, float, float], None]

# An image task carries its image in base64; nothing that a validator sends is larger.
MAX_ANSWER_BYTES = 16 << 20


class _BoundedResponse(aiohttp.ClientResponse):
    """A response whose body is read up to MAX_ANSWER_BYTES, as it comes after decompression."""

    async def read(self) -> bytes:
        if self._body is None:
            body = bytearray()
            async for chunk in self.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    self.close()
                    raise aiohttp.ClientPayloadError(f"answer is larger than {MAX_ANSWER_BYTES} bytes")
            self._body = bytes(body)
            self.release()
        return self._body


async def _refuse_redirects(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise aiohttp.ClientPayloadError(f"answer is a redirect ({response.status})")
    return response


class ValidatorDendrite(bt.Dendrite):
    """Calls validators' axons, and nothing but them: no redirects, answers of bounded size."""

    def __init__(self, keypair: bt.Keypair, on_date: DateListener = lambda *_: None) -> None:
        # In place of Dendrite's own constructor, which asks six web sites for this machine's address and fails without
        # an answer. The address goes into a header only, where the axon overwrites it with the one that it sees.
        self.uuid = str(uuid.uuid1())
        self.external_ip = "0.0.0.0"
        self.keypair = keypair
        # Dendrite appends every call for good: a leak in a process that runs for weeks.
        self.synapse_history = collections.deque(maxlen=0)  # type: ignore[assignment]
        self._session: aiohttp.ClientSession | None = None
        self._on_date = on_date

    def __del__(self) -> None:
        """Nothing: sessions are closed with `async with`. Dendrite's own would warn about a running event loop."""

    @property
    async def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                response_class=_BoundedResponse,
                middlewares=(_refuse_redirects, self._report_date),
                # Unused cookies would be state that a validator keeps in this process.
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _report_date(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        sent = steady_time()
        response = await handler(request)
        self._on_date(request.headers["bt_header_axon_hotkey"], response.headers.get("Date"), sent, steady_time())
        return response

    def _get_endpoint_url(self, target_axon: bt.AxonInfo, request_name: str) -> str:
        # Dendrite calls an axon that has its own external address at 0.0.0.0: this machine, for whoever names it so.
        host = f"[{target_axon.ip}]" if ":" in target_axon.ip else target_axon.ip
        return f"http://{host}:{target_axon.port}/{request_name}"
