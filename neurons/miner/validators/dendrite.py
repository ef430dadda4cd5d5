"""bittensor's Dendrite, hardened for machines without internet and against hostile validators."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import bittensor as bt
from bittensor.core.settings import version_as_int

from neurons.miner.validators.clock import steady_time, steady_time_ns
from neurons.protocol import ANSWER_FIELDS

# Called with a validator's hotkey, the Date header of its answer, and our time at the request and at the answer.
DateListener = Callable[[str, str | None, float, float], None]

# An axon accepts a sender's first nonce if it is at most as old as the time-out that the request declares, plus 4 s.
# After a refusal, requests declare this time-out, plus how far the validator's clock is ahead.
DECLARED_AFTER_REFUSAL_S = 60.0
UNAUTHORISED = 401

# An image task carries its image in base64; nothing that a validator sends is larger.
MAX_ANSWER_BYTES = 16 << 20
# An answer has some 40 values. Megabytes of empty lists would take seconds, and thirty times their size, to parse.
MAX_ANSWER_COMMAS = 10_000
MAX_MESSAGE_CHARACTERS = 500
# A host that is down or behind a firewall refuses nothing. Without a limit of its own, a call would wait for all of its
# time-out there, and a submission would count as one that may have arrived.
CONNECT_TIMEOUT_S = 10.0
# Axons close an idle connection after 5 s, and a call on a closed one fails. The miner bounds
# their number: it has one call at a time for each validator. A limit here would let some wait for others.
KEEPALIVE_S = 4.0
# The status of a call whose connection could not be made, and of one that lost it later.
NO_CONNECTION, CONNECTION_LOST = 503, 502

SynapseT = TypeVar("SynapseT", bound=bt.Synapse)


class _Sender:
    """This miner's identity towards one validator, whose axon demands that the nonces of one `uuid` grow.

    Each validator gets its own uuid, so that none can spoil the others'. A new process has new ones, so that it does
    not matter where its clock stands. uuid1 would tell the network card's address.
    """

    def __init__(self) -> None:
        self.uuid = str(uuid.uuid4())
        self.refused = False
        self._nonce = 0

    def next_nonce(self) -> int:
        self._nonce = max(self._nonce + 1, steady_time_ns())
        return self._nonce

    def renew(self) -> None:
        self.uuid = str(uuid.uuid4())
        self.refused = True


class ValidatorDendrite(bt.Dendrite):
    """Calls validators' axons, and nothing but them: no redirects, no proxies, answers of bounded size.

    Requests are as Dendrite's but for their nonces. Dendrite takes those from the machine's clock, and after it was
    set back, an axon refuses them for as long. Answers are not read by Dendrite's code, which would let a validator set
    every field of the synapse (and raise from `call` by doing so), send compressed data, or choose a slow codec.
    """

    def __init__(self, keypair: bt.Keypair) -> None:
        # In place of Dendrite's own constructor, which asks six web sites for this machine's address and fails without
        # an answer. The address goes into a header only, where the axon overwrites it with the one that it sees.
        self.external_ip = "0.0.0.0"
        self.keypair = keypair
        self._session: aiohttp.ClientSession | None = None
        self.on_date: DateListener = lambda *_: None
        # How far the clock of the validator with a hotkey is ahead of ours, at most.
        self.seconds_ahead: Callable[[str], float] = lambda _: 0.0
        self._senders: dict[str, _Sender] = {}

    def __del__(self) -> None:
        """Nothing: sessions are closed with `async with`. Dendrite's own would warn about a running event loop."""

    @property
    async def session(self) -> aiohttp.ClientSession:
        """The one HTTP session, made at the first call."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                # No cookies and no compression: a validator could make this process keep state and do work.
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
            )
        return self._session

    async def call(  # type: ignore[override]
        self,
        target_axon: bt.AxonInfo,
        synapse: SynapseT,
        timeout: float = 12.0,  # noqa: ASYNC109 - bittensor's name
        deserialize: bool = False,
    ) -> SynapseT:
        """`synapse` with its ANSWER_FIELDS as the axon answered, and its `dendrite` status saying how it went.

        `is_success` needs a complete, well-formed answer with status 200. The `axon` status is that of any complete
        answer, and None when there was none: then the `dendrite` status is NO_CONNECTION where none was made, so that
        nothing can have arrived, and another one where the request may have.
        """
        # A 401 is answered with another uuid at once, and not again before this validator has taken one. `timeout` is
        # for each of the two requests.
        sender = self._senders.setdefault(target_axon.hotkey, _Sender())
        refused_before = sender.refused
        status = await self._attempt(target_axon, synapse, timeout, sender)
        if status == UNAUTHORISED and not refused_before:
            await self._attempt(target_axon, synapse, timeout, sender)
        return synapse

    async def _attempt(
        self, target_axon: bt.AxonInfo, synapse: bt.Synapse, seconds: float, sender: _Sender
    ) -> int | None:
        """One request and its answer; the status of the axon."""
        self._sign(target_axon, synapse, seconds, sender)
        assert synapse.axon is not None
        assert synapse.dendrite is not None
        code, message = 0, "Success"
        try:
            status, body = await self._post(target_axon, synapse, seconds)
            synapse.axon.status_code = code = status
            answer = parse(body)
            if status == 200:
                fill(synapse, answer)
            else:
                message = str(answer.get("message"))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            code, message = NO_CONNECTION, f"{type(error).__name__}: {error}"
        except TimeoutError:
            code, message = 408, f"no answer within {seconds:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            code, message = CONNECTION_LOST, f"{type(error).__name__}: {error}"
        except (ValueError, RecursionError) as error:
            if code in (0, 200):
                code = 422
            message = f"malformed answer: {error}"
        synapse.dendrite.status_code = code
        synapse.dendrite.status_message = message[:MAX_MESSAGE_CHARACTERS]
        if synapse.axon.status_code == UNAUTHORISED:
            sender.renew()
        elif synapse.axon.status_code is not None:
            sender.refused = False
        return synapse.axon.status_code

    def _sign(self, target_axon: bt.AxonInfo, synapse: bt.Synapse, timeout: float, sender: _Sender) -> None:
        declared = timeout
        if sender.refused:
            ahead = max(self.seconds_ahead(target_axon.hotkey), 0.0)
            declared = max(timeout, DECLARED_AFTER_REFUSAL_S + ahead)
        hotkey = self.keypair.ss58_address
        nonce = sender.next_nonce()
        message = f"{nonce}.{hotkey}.{target_axon.hotkey}.{sender.uuid}.{synapse.body_hash}"
        synapse.timeout = declared
        synapse.dendrite = bt.TerminalInfo(
            ip=self.external_ip,
            version=version_as_int,
            nonce=nonce,
            uuid=sender.uuid,
            hotkey=hotkey,
            signature=f"0x{self.keypair.sign(message).hex()}",
        )
        synapse.axon = bt.TerminalInfo(ip=target_axon.ip, port=target_axon.port, hotkey=target_axon.hotkey)

    async def _post(self, target_axon: bt.AxonInfo, synapse: bt.Synapse, seconds: float) -> tuple[int, bytes]:
        """Status and body of the answer."""
        sent = steady_time()
        async with (await self.session).post(
            self._get_endpoint_url(target_axon, type(synapse).__name__),
            headers=synapse.to_headers(),
            json=synapse.model_dump(),
            timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_TIMEOUT_S),
            allow_redirects=False,
        ) as response:
            self.on_date(target_axon.hotkey, response.headers.get("Date"), sent, steady_time())
            body = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    response.close()
                    raise aiohttp.ClientPayloadError(f"answer is larger than {MAX_ANSWER_BYTES} bytes")
            return response.status, bytes(body)

    def _get_endpoint_url(self, target_axon: bt.AxonInfo, request_name: str) -> str:
        # Dendrite calls an axon with the same external address at 0.0.0.0. So a validator could name this machine.
        host = f"[{target_axon.ip}]" if ":" in target_axon.ip else target_axon.ip
        return f"http://{host}:{target_axon.port}/{request_name}"


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer. Raises ValueError or RecursionError."""
    if body.count(b",") > MAX_ANSWER_COMMAS:
        raise ValueError("too many values")
    answer = json.loads(body)
    if not isinstance(answer, dict):
        raise ValueError("no JSON object")
    return answer


def fill(synapse: bt.Synapse, answer: dict[str, Any]) -> None:
    """Copies the answer's ANSWER_FIELDS into `synapse`, and nothing else. Raises ValueError for a wrong type."""
    for name in ANSWER_FIELDS[type(synapse)]:
        if name in answer:
            setattr(synapse, name, answer[name])
