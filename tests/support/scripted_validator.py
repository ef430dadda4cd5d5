"""A miner over one validator whose answers a test scripts, in virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import bittensor as bt

from neurons.chain import Metagraph, Neuron
from neurons.miner.assemble import assemble
from neurons.miner.records.events import Settlement, Submission
from neurons.miner.records.verdicts import PastSubmission
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.dendrite import CONNECTION_LOST, NO_CONNECTION
from neurons.protocol import Feedback, PullTask, SubmitResults, TextTask
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import MemoryBooks, StandInService, options_in
from scripts.bench.virtual_time import now

KEYPAIR = bt.Keypair.create_from_uri("//miner")


VALIDATOR = Neuron(7, bt.Keypair.create_from_uri("//validator").ss58_address, "127.0.0.1", 9000, 1e4, True)


GENERATION_S = 10.0


CLOCK_AHEAD_S = 120.0  # of the validator's


@dataclass(frozen=True)
class Answer:
    """To a submission. `ahead`: None repeats the old `cooldown_until`. `arrived`: None where none was needed."""

    status: int | None = 200
    validation_failed: bool = False
    score: float = 0.0
    ahead: float | None = None
    count: int = 0
    seconds: float = 1.0


# The table of what the feedback of each outcome says.
ACCEPTED = Answer(score=0.8, ahead=285, count=1)


DECLINED = Answer(ahead=885)  # under the threshold, a bad signature, an exception inside scoring: they look the same


BROKEN = Answer(validation_failed=True, ahead=285)


EMPTY = Answer(ahead=285)


REPETITION = Answer()  # the lock, or a wrong id


SECOND_AFTER_ACCEPTED = Answer(ahead=280, count=1)  # of two that overlapped


LOST = Answer(status=None)


NOT_ASSIGNED = Answer(status=403)


class Scripted:
    """A validator in the place of a dendrite that says what it is told to.

    `pulls`: a task's name, seconds of a cooldown, a whole answer, or None for no connection; then it is on cooldown.
    """

    def __init__(self, pulls: Sequence[str | float | PullTask | None], answers: Sequence[Answer]) -> None:
        self.pulls, self.answers = deque(pulls), deque(answers)
        self.pulled_at: list[float] = []
        self.submissions: list[tuple[float, SubmitResults]] = []
        self.on_date: Callable[..., None] = lambda *_: None
        self.seconds_ahead: Callable[[str], float] = lambda _: 0.0
        self.old_cooldown = 0

    def clock(self) -> float:
        return now() + CLOCK_AHEAD_S

    async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        sent, status = now(), 200
        await asyncio.sleep(0.1)
        if isinstance(synapse, PullTask):
            self.pulled_at.append(sent)
            said = self.pulls.popleft() if self.pulls else 7200.0
            if isinstance(said, str):
                synapse.task = TextTask(id=said, prompt=f"prompt of {said}")
            elif isinstance(said, float | int):
                synapse.cooldown_until, synapse.cooldown_violations = int(self.clock() + said), 1
            elif said is None:
                return _answered(synapse, None, NO_CONNECTION)
            else:
                synapse.cooldown_until = said.cooldown_until
        else:
            self.submissions.append((sent, synapse))
            answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
            await asyncio.sleep(min(answer.seconds, timeout))
            if answer.seconds > timeout:
                return _answered(synapse, None, 408)
            if answer.status is None:
                return _answered(synapse, None, CONNECTION_LOST)
            status = answer.status
            if status == 200:
                if answer.ahead is not None:
                    self.old_cooldown = int(self.clock() + answer.ahead)
                synapse.cooldown_until = self.old_cooldown
                synapse.feedback = Feedback(
                    validation_failed=answer.validation_failed,
                    task_fidelity_score=answer.score,
                    average_fidelity_score=1.0,
                    generations_within_the_window=answer.count,
                )
        self.on_date(target_axon.hotkey, formatdate(self.clock(), usegmt=True), sent, now())
        return _answered(synapse, status, status)


def _answered(synapse: Any, axon: int | None, dendrite: int) -> Any:
    synapse.axon, synapse.dendrite = bt.TerminalInfo(status_code=axon), bt.TerminalInfo(status_code=dendrite)
    return synapse


class Service(StandInService):
    rejects = False

    async def generate(self, task: Any, seed: int, *effort: Any) -> Any:
        generated = await super().generate(task, seed, *effort)
        return replace(generated, ply=b"", rejected="score 0.2") if self.rejects else generated


async def metagraph() -> Metagraph:
    return Metagraph(17, (VALIDATOR,))


class Miner:
    """The assembled parts, over one validator and one service."""

    def __init__(self, validator: Scripted, folder: Path, history: Sequence[PastSubmission] = ()) -> None:
        self.validator = validator
        self.books = MemoryBooks(past=history)
        self.events = self.books.events
        self.service = Service(GENERATION_S, 4)
        self._options = replace(options_in(folder), spool=folder, retries=0)

    async def run(self, seconds: float) -> None:
        miner = await assemble(
            *(self._options, KEYPAIR),
            dendrite=self.validator,
            services=[self.service],
            fetch=metagraph,
            blacklist=Blacklist(()),
            books=self.books,
            now=now,
        )
        miner.directory.update(await metagraph())
        miner.manager.sync()
        parts = [asyncio.create_task(part) for part in (miner.pool.watch(), *(each.run() for each in miner.workers))]
        await asyncio.sleep(seconds)
        await miner.manager.close()
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        await miner.submitter.drain(0.0)

    @property
    def submissions(self) -> list[tuple[str, str]]:
        return [(event.task_id, event.outcome) for event in self.events if isinstance(event, Submission)]

    @property
    def settlements(self) -> list[tuple[str, str]]:
        return [(event.task_id, event.outcome) for event in self.events if isinstance(event, Settlement)]


def mine(
    folder: Path,
    pulls: Sequence[str | float | PullTask | None],
    answers: Sequence[Answer],
    seconds: float = 600.0,
    rejects: bool = False,
) -> Miner:
    async def main() -> Miner:
        miner = Miner(Scripted(pulls, answers), folder)
        miner.service.rejects = rejects
        await miner.run(seconds)
        return miner

    return virtual_time.run(main())
