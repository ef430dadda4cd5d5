"""Measure the miner against a sequential one on a simulated subnet: four hours in virtual time, 12 validators.

Both meet validators that keep the rehearsal's rules by clocks of their own (up to 5 s off, one of them an hour), over a
network with delays. The sequential miner does what the subnet's base miner does: one task at a time from the next
validator in turn, waiting for everything, and 10 s of sleep when none is free. Ours is the real miner, put
together as in production. Generators are stand-ins with a set duration and concurrency.

    python -m scripts.bench.miner [--hours 4] [--case TEXT] [--best-of]

With --best-of it compares our miner with one candidate a task and with as many as cost nothing, for generators of
different speeds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from neurons.miner.records.events import Generation
from neurons.protocol import PULL_TIMEOUT_S, SUBMIT_TIMEOUT_S, PullTask, make_submission
from neurons.rehearsal.rules import Limits
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import (
    MINER,
    SPLAT,
    Behaviour,
    MemoryBooks,
    SimulatedNetwork,
    SimulatedValidator,
    StandInService,
    options_in,
    simulated_miner,
)
from scripts.bench.virtual_time import now

# What the base miner does.
SEQUENTIAL_IDLE_SLEEP_S = 10.0
SEQUENTIAL_PULL_COOLDOWN_S = 60.0
SEQUENTIAL_SUBMIT_ATTEMPTS = 3
SEQUENTIAL_SUBMIT_PAUSE_S = 10.0

WARM_UP_S = 1200.0
BestOf = int | Literal["auto"]
BEST_OF: tuple[BestOf, ...] = (1, "auto")
CLOCK_OFFSETS_S = (0.0, 0.4, -0.7, 1.5, -1.5, 2.6, -2.6, 3.7, -4.2, 5.0, -5.0, 3600.0)
ALL_GOOD = tuple(Behaviour(clock_offset=offset) for offset in CLOCK_OFFSETS_S)
# 2 of 12 never answer, 4 take 8 s to hand out a task and 45 s to validate a result.
MIXED = (
    *(replace(each, dead=True) for each in ALL_GOOD[:2]),
    *(replace(each, pull_delay=8.0, validation=45.0) for each in ALL_GOOD[2:6]),
    *ALL_GOOD[6:],
)


@dataclass(frozen=True)
class Speed:
    """A generator: seconds for a task, and how many at once."""

    seconds: float
    at_once: int

    def __str__(self) -> str:
        return f"{self.seconds:g} s x {self.at_once}"


@dataclass(frozen=True)
class Case:
    cooldown: float
    throttle: float
    theirs: Speed
    ours: Speed
    validators: tuple[Behaviour, ...] = ALL_GOOD
    note: str = ""
    apart: float = 0.0  # seconds from one validator's first task to the next one's, as after hours of uneven delays

    def __str__(self) -> str:
        return f"{self.cooldown:g}/{self.throttle:g} s" + (f", {self.note}" if self.note else "")

    @property
    def limits(self) -> Limits:
        return replace(Limits(), task_cooldown=self.cooldown, throttle_period=self.throttle)


BASE = Speed(118.0, 1)  # measured with the subnet's own generation code
PROMISE = Speed(20.0, 4)
AIM = Speed(2.3, 1)
CASES = [
    Case(cooldown, throttle, theirs, ours, validators, note)
    for cooldown, throttle in ((60.0, 20.0), (300.0, 30.0))
    for theirs, ours, validators, note in (
        (BASE, PROMISE, ALL_GOOD, "each with its own generator"),
        (BASE, AIM, ALL_GOOD, "each with its own generator"),
        (BASE, BASE, ALL_GOOD, "equal generators"),
        (PROMISE, PROMISE, ALL_GOOD, "equal generators"),
        (AIM, AIM, ALL_GOOD, "equal generators"),
        (BASE, PROMISE, MIXED, "2 dead, 4 slow"),
        (BASE, AIM, MIXED, "2 dead, 4 slow"),
    )
]


def cooldown_ceiling(case: Case, behaviour: Behaviour, seconds: float) -> int:
    """Tasks that one validator's cooldowns allow, over a network without delays and with a generator that is free.

    A task is held for its generation and whatever the validator itself takes. The cooldown then ends
    max(now + cooldown - throttle, assignment + cooldown), and the next task begins.
    """
    if behaviour.dead:
        return 0
    held = behaviour.pull_delay + case.ours.seconds + behaviour.validation
    cycle = max(case.cooldown, held + case.cooldown - case.throttle)
    return max(0, int((seconds - held) // cycle) + 1)


FAST, SECONDS, SLOW = Speed(0.5, 1), Speed(2.8, 1), Speed(20.0, 1)
BEST_OF_CASES = [
    Case(300.0, 30.0, BASE, ours, validators, note, apart)
    for ours in (FAST, SECONDS, SLOW, PROMISE)
    for validators, note, apart in (
        (ALL_GOOD, "all in step", 0.0),
        (ALL_GOOD, "25 s apart", 25.0),
        (MIXED, "2 dead, 4 slow", 0.0),
    )
]


def ceiling(case: Case, seconds: float) -> int:
    """What all cooldowns or the generators allow, whichever is less."""
    cooldowns = sum(
        cooldown_ceiling(case, behaviour, seconds - number * case.apart)
        for number, behaviour in enumerate(case.validators)
    )
    return min(cooldowns, case.ours.at_once * int(seconds // case.ours.seconds))


async def sequential_miner(network: SimulatedNetwork, service: StandInService) -> None:
    cooldowns = {validator.hotkey: 0.0 for validator in network.validators}
    turn = 0
    while True:
        order = network.validators[turn:] + network.validators[:turn]
        free = [validator for validator in order if cooldowns[validator.hotkey] <= now()]
        if not free:
            await asyncio.sleep(SEQUENTIAL_IDLE_SLEEP_S)
            continue
        turn = (network.validators.index(free[0]) + 1) % len(network.validators)
        cooldowns[free[0].hotkey] = now() + SEQUENTIAL_PULL_COOLDOWN_S
        cooldowns[free[0].hotkey] = await _one_task(network, service, free[0]) or cooldowns[free[0].hotkey]


async def _one_task(network: SimulatedNetwork, service: StandInService, validator: SimulatedValidator) -> float:
    """The cooldown that the validator announced; 0 when it announced none."""
    axon = validator.neuron.axon_info()
    pull = await network.call(axon, PullTask(), timeout=PULL_TIMEOUT_S, deserialize=False)
    if pull.task is None:
        return float(pull.cooldown_until)
    await service.generate(pull.task, 0)
    for _ in range(SEQUENTIAL_SUBMIT_ATTEMPTS):
        submission = make_submission(pull.task, SPLAT, validator.hotkey, MINER)
        answer = await network.call(axon, submission, timeout=SUBMIT_TIMEOUT_S, deserialize=False)
        if answer.feedback is not None:
            return float(answer.cooldown_until)
        await asyncio.sleep(SEQUENTIAL_SUBMIT_PAUSE_S)
    return 0.0


async def our_miner(
    network: SimulatedNetwork, service: StandInService, folder: Path, best_of: BestOf, books: MemoryBooks
) -> None:
    miner = await simulated_miner(replace(options_in(folder), best_of=best_of), network, [service], books)
    await asyncio.gather(miner.pool.watch(), *(worker.run() for worker in miner.workers))


async def for_seconds(seconds: float, miner: Awaitable[None]) -> None:
    """Runs a miner for a set time; raises what it raises."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await miner


@dataclass(frozen=True)
class Outcome:
    """`accepted` is by validator; held: seconds from task to result, once generators are measured."""

    accepted: tuple[int, ...]
    violations: int
    longest_held: float
    mean_held: float
    candidates: tuple[int, ...]  # of each task
    busy: float  # the share of the time in which the generator works

    @property
    def total(self) -> int:
        return sum(self.accepted)


def simulate(case: Case, seconds: float, ours: bool, best_of: BestOf = "auto") -> Outcome:
    async def main() -> Outcome:
        network = SimulatedNetwork(case.validators, case.limits)
        speed = case.ours if ours else case.theirs
        service = StandInService(speed.seconds, speed.at_once)
        began = now()
        with tempfile.TemporaryDirectory() as folder:
            books = MemoryBooks()
            for number, validator in enumerate(network.validators):
                books.known_cooldowns[validator.hotkey] = began + number * case.apart
            miner = (
                our_miner(network, service, Path(folder), best_of, books)
                if ours
                else sequential_miner(network, service)
            )
            await for_seconds(seconds, miner)
            held = [held for validator in network.validators for at, held in validator.held if at > began + WARM_UP_S]
            outcome = Outcome(
                accepted=tuple(validator.accepted for validator in network.validators),
                violations=sum(validator.violations for validator in network.validators),
                longest_held=max(held, default=0.0),
                mean_held=sum(held) / max(len(held), 1),
                candidates=tuple(each.candidates for each in books.events if isinstance(each, Generation)),
                busy=service.engine.busy_s / speed.at_once / seconds,
            )
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        return outcome

    return virtual_time.run(main())


def kept(case: Case, outcome: Outcome, seconds: float) -> str:
    """What the good validators accept, as a share of what they do when there are no others; "" without others."""
    if case.validators is not MIXED:
        return ""
    alone = simulate(replace(case, validators=ALL_GOOD), seconds, ours=True)
    good = [index for index, each in enumerate(MIXED) if each in ALL_GOOD]
    return f"{sum(outcome.accepted[index] for index in good) / sum(alone.accepted[index] for index in good):.1%}"


def compare_best_of(cases: list[Case], seconds: float) -> Table:
    table = Table(title=f"Best of many: tasks accepted in {seconds / 3600:g} hours")
    for name in ("generator", "validators", "best of"):
        table.add_column(name)
    for name in ("tasks", "ceiling", "share", "candidates", "least", "most", "held mean", "most", "violations", "busy"):
        table.add_column(name, justify="right")
    for case in cases:
        for best_of in BEST_OF:
            outcome = simulate(case, seconds, ours=True, best_of=best_of)
            counts, allowed = outcome.candidates, ceiling(case, seconds)
            table.add_row(
                str(case.ours),
                case.note,
                str(best_of),
                str(outcome.total),
                str(allowed),
                f"{outcome.total / allowed:.1%}",
                f"{sum(counts) / len(counts):.1f}",
                str(min(counts)),
                str(max(counts)),
                f"{outcome.mean_held:.1f}",
                f"{outcome.longest_held:.1f}",
                str(outcome.violations),
                f"{outcome.busy:.0%}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--case", default="", help="only cases whose description contains this")
    parser.add_argument("--best-of", action="store_true", help="one candidate a task beside as many as cost nothing")
    args = parser.parse_args()
    logging.getLogger("neurons").setLevel(logging.CRITICAL)
    seconds = args.hours * 3600
    if args.best_of:
        cases = [case for case in BEST_OF_CASES if args.case in f"{case}, {case.ours}"]
        Console(width=160).print(compare_best_of(cases, seconds))
        return
    table = Table(title=f"Tasks accepted in {args.hours:g} hours from {len(CLOCK_OFFSETS_S)} validators")
    table.add_column("cooldown/throttle")
    table.add_column("generator of theirs, ours")
    for name in ("sequential", "ours", "ratio", "ceiling", "share", "good kept", "held s", "violations"):
        table.add_column(name, justify="right")
    began = time.perf_counter()
    for case in CASES:
        if args.case not in str(case):
            continue
        theirs, ours = simulate(case, seconds, ours=False), simulate(case, seconds, ours=True)
        allowed = ceiling(case, seconds)
        table.add_row(
            str(case),
            f"{case.theirs}, {case.ours}",
            str(theirs.total),
            str(ours.total),
            f"{ours.total / max(theirs.total, 1):.1f}",
            str(allowed),
            f"{ours.total / allowed:.1%}",
            kept(case, ours, seconds),
            f"{ours.longest_held:.0f}",
            f"{theirs.violations}, {ours.violations}",
        )
    Console(width=160).print(table)
    print("ceiling: what cooldowns or generators allow over a network without delays; share: ours of it.")
    print("good kept: tasks of the validators that are neither dead nor slow, of theirs without such ones.")
    print("held: longest from task to result after 20 minutes. violations: sequential, ours.")
    print(f"{time.perf_counter() - began:.0f} s of real time")


if __name__ == "__main__":
    main()
