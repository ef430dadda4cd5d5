"""A subnet in virtual time: validators that keep the rehearsal's rules, behind a network with delays, and generators.

`SimulatedNetwork` takes the place of the miner's dendrite, `StandInService` that of a generation service,
`MemoryBooks` that of its ledger. `simulated_miner` assembles the real miner around them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import bittensor as bt
import numpy as np

from common import ply
from generation.fleet.candidates import Candidates
from generation.schema.results import Asset, Report, Request
from neurons.chain import Metagraph, Neuron
from neurons.defaults import NETUID, REHEARSAL
from neurons.miner.assemble import Books, Miner, assemble
from neurons.miner.generation.pool import Service
from neurons.miner.generation.service import Generated
from neurons.miner.options import MinerOptions
from neurons.miner.records.events import Event
from neurons.miner.records.verdicts import PastSubmission
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.dendrite import DateListener
from neurons.protocol import PullTask, SubmitResults, Task
from neurons.rehearsal.network import load_prompts, shuffled
from neurons.rehearsal.rules import Judgement, Limits, Rules
from scripts.bench.virtual_time import now

MINER = bt.Keypair.create_from_uri("//miner")
# Seconds for one way over the network, drawn anew for each.
ONE_WAY_S = (0.02, 0.2)
VALIDATION_S = 1.0
FIRST_PORT = 9000
SCORE = 0.8

SPLAT = ply.write(ply.Vertices(ply.columns(0), np.ones((3, 17), dtype=np.float32)))


@dataclass(frozen=True)
class Behaviour:
    """What kind of validator it is. `clock_offset`: seconds that its clock is ahead; the delays are its own doing."""

    clock_offset: float = 0.0
    dead: bool = False
    pull_delay: float = 0.0
    validation: float = VALIDATION_S
    score: float = SCORE


class SimulatedValidator:
    """The rules by this validator's own clock, and a Date header as uvicorn writes it: once a second."""

    def __init__(self, uid: int, behaviour: Behaviour, limits: Limits) -> None:
        self.behaviour = behaviour
        self.hotkey: str = bt.Keypair.create_from_uri(f"//validator{uid}").ss58_address
        self.neuron = Neuron(uid, self.hotkey, "127.0.0.1", FIRST_PORT + uid, 1e4, serving=True)
        self.accepted = 0
        self.violations = 0
        self.held: list[tuple[float, float]] = []  # (unix time of a result, seconds since its task was handed out)
        self.rules = Rules(limits, [MINER.ss58_address], shuffled(load_prompts(), uid), clock=self.clock)
        self._header_phase = random.Random(uid).random()

    def clock(self) -> float:
        return now() + self.behaviour.clock_offset

    def date_header(self) -> str:
        clock = self.clock()
        return formatdate(clock - (clock - self._header_phase) % 1, usegmt=True)

    async def pull(self, synapse: PullTask) -> None:
        answer = self.rules.pull(MINER.ss58_address)
        self.violations += answer.violations > 0
        synapse.task, synapse.cooldown_until = answer.task, answer.cooldown_until
        synapse.cooldown_violations = answer.violations
        synapse.validation_threshold = answer.validation_threshold
        synapse.throttle_period = answer.throttle_period
        await asyncio.sleep(self.behaviour.pull_delay)

    async def submit(self, synapse: SubmitResults) -> int:
        """The HTTP status."""
        miner = MINER.ss58_address
        if self.rules.reason_to_refuse(miner) is not None:
            return 403
        assigned_at = self.rules.miners[miner].assigned_at or 0.0
        judgement = self.rules.receive(miner, synapse.task_id, lambda _: True, empty=not synapse.results)
        if not isinstance(judgement, Judgement):
            self.held.append((now(), self.clock() - assigned_at))
            await asyncio.sleep(self.behaviour.validation)
            judgement = self.rules.score(miner, self.behaviour.score)
            self.accepted += judgement.outcome == "accepted"
        synapse.feedback = judgement.feedback
        synapse.cooldown_until = judgement.cooldown_until
        return 200


class SimulatedNetwork:
    """In the place of a ValidatorDendrite."""

    def __init__(self, behaviours: Sequence[Behaviour], limits: Limits, seed: int = 0) -> None:
        self.validators = [SimulatedValidator(uid, each, limits) for uid, each in enumerate(behaviours)]
        self.on_date: DateListener = lambda *_: None
        self.seconds_ahead: Callable[[str], float] = lambda _: 0.0
        self._random = random.Random(seed)

    def metagraph(self) -> Metagraph:
        miner = Neuron(len(self.validators), MINER.ss58_address, "0.0.0.0", 0, 0.0, serving=False)
        return Metagraph(NETUID, (*(validator.neuron for validator in self.validators), miner))

    async def fetch(self) -> Metagraph:
        return self.metagraph()

    async def call(self, target_axon: bt.AxonInfo, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        validator = self.validators[target_axon.port - FIRST_PORT]
        sent, status = now(), None
        try:
            async with asyncio.timeout(timeout):
                await asyncio.sleep(timeout + 1 if validator.behaviour.dead else self._one_way())
                if isinstance(synapse, PullTask):
                    await validator.pull(synapse)
                    status = 200
                else:
                    status = await validator.submit(synapse)
                date = validator.date_header()
                await asyncio.sleep(self._one_way())
            self.on_date(validator.hotkey, date, sent, now())
        except TimeoutError:
            status = None
        synapse.axon = bt.TerminalInfo(status_code=status)
        synapse.dendrite = bt.TerminalInfo(status_code=status or 408, status_message="")
        return synapse

    def _one_way(self) -> float:
        return self._random.uniform(*ONE_WAY_S)


@dataclass
class MemoryBooks:
    """In the place of Bookkeeping, whose ledger writes in real time.

    `past` and `known_cooldowns` are what an earlier run knew; `left_alone_until` is who is not worth asking.
    """

    events: list[Event] = field(default_factory=list)
    past: Sequence[PastSubmission] = ()
    known_cooldowns: dict[str, float] = field(default_factory=dict)
    left_alone_until: dict[str, float] = field(default_factory=dict)

    def record(self, event: Event) -> None:
        self.events.append(event)

    def worth_asking_at(self, hotkey: str) -> float:
        return self.left_alone_until.get(hotkey, 0.0)

    async def cooldowns(self) -> dict[str, float]:
        return self.known_cooldowns

    async def submissions(self) -> Sequence[PastSubmission]:
        return self.past


def options_in(folder: Path) -> MinerOptions:
    """The miner's defaults, in a rehearsal that keeps its files in `folder`."""
    return MinerOptions(
        network=REHEARSAL,
        wallet_name="rehearsal",
        wallet_hotkey="miner",
        wallet_path=folder,
        rehearsal_state=folder,
        metrics_port=0,
    )


class StandInEngine:
    """In the place of the service's engine: `seconds` for a candidate, `at_once` side by side, the others wait."""

    def __init__(self, seconds: float, at_once: int) -> None:
        self.generated = 0
        self.busy_s = 0.0  # summed over the places
        self._seconds = seconds
        self._at_once = at_once
        self._asked = 0
        self._slots = asyncio.Semaphore(at_once)

    def spare(self, background: bool) -> int:
        return max(0, self._at_once - self._asked - (self._at_once > 1))

    async def generate(self, request: Request, on_progress: Any = None) -> Asset:
        self._asked += 1
        try:
            async with self._slots:
                began = now()
                try:
                    await asyncio.sleep(self._seconds)
                finally:
                    self.busy_s += now() - began
        finally:
            self._asked -= 1
        self.generated += 1
        return Asset(SPLAT, Report(request.seed, score=SCORE, num_gaussians=3))


class StandInService:
    """A generation service: the real one's candidates on a stand-in engine."""

    def __init__(self, seconds: float, at_once: int, endpoint: str = "http://stand-in") -> None:
        self.endpoint = endpoint
        self.engine = StandInEngine(seconds, at_once)
        self._candidates = Candidates(self.engine)

    @property
    def generated(self) -> int:
        return self.engine.generated

    async def health(self) -> str | None:
        return "ready"

    async def generate(self, task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        began = now()
        request = Request(
            prompt="p", seed=seed, threshold=0.6, background=True, candidates=candidates, budget_seconds=budget
        )
        report = (await self._candidates.generate(request)).report
        scores = tuple(score for _, score in report.candidates)
        return Generated(SPLAT, SCORE, str(report.seed), "", self.endpoint, now() - began, scores=scores)


async def simulated_miner(
    options: MinerOptions,
    network: SimulatedNetwork,
    services: Sequence[Service],
    books: Books,
    blacklist: Blacklist | None = None,
) -> Miner:
    """The assembled miner on this network, by its virtual clock. It knows the validators; no part runs yet."""
    miner = await assemble(
        options,
        MINER,
        dendrite=network,
        services=services,
        fetch=network.fetch,
        blacklist=blacklist or Blacklist(()),
        books=books,
        now=now,
    )
    miner.directory.update(network.metagraph())
    miner.manager.sync()
    return miner
