"""Events and validators for the tests of the ledger and of those who read it."""

from __future__ import annotations

from pathlib import Path

from neurons.chain import Neuron
from neurons.miner.records.events import Event, Generation, Pull, Submission, SubmissionOutcome
from neurons.miner.records.ledger import Ledger
from neurons.protocol import Feedback, ImageTask, TextTask

NOW = 1_800_000_000.0


def validator(uid: int) -> Neuron:
    return Neuron(uid, f"hotkey{uid}", "192.0.2.1", 8091, 1e4, True)


def one_task(
    uid: int,
    at: float,
    *,
    score: float = 0.7,
    accepted: bool = True,
    seconds: float = 20.0,
    wait: float = 280.0,
    reward: float = 1500.0,
    image: bool = False,
) -> list[tuple[float, Event]]:
    """Pull, generation and submission of one task that was pulled at `at`, each with its time."""
    kind = ImageTask if image else TextTask
    task = kind(id=f"{uid} at {at}", prompt="a red cube")
    who = validator(uid)
    feedback = Feedback(task_fidelity_score=score if accepted else 0.0, current_miner_reward=reward)
    outcome: SubmissionOutcome = "accepted" if accepted else "declined"
    done = at + seconds + 2
    return [
        (at, Pull(who, "task", 0.2, task.id, violations=0)),
        (at + seconds, Generation(who, task, "generated", seconds, 0.75, 1000, "http://127.0.0.1:10006")),
        (done, Submission(who, task.id, outcome, 2.0, 1000, feedback, done + wait)),
    ]


def write(path: Path, events: list[tuple[float, Event]]) -> None:
    """A ledger of `events`, as a miner would have written it that lived through them."""
    clock = [NOW]
    ledger = Ledger(path, now=lambda: clock[0])
    ledger.start()
    for at, event in sorted(events, key=lambda pair: pair[0]):
        clock[0] = at
        ledger.record(event)
    ledger.close(timeout=60.0)
    assert ledger.backlog == 0
