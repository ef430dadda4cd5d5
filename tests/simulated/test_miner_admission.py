"""How many tasks are held, and in whose favour room is given."""

from __future__ import annotations

import asyncio

import pytest

from neurons.miner.tasks.admission import PLANNED_AGE_S, Admission, Place


class Forecast:
    def __init__(self, seconds: float | None, at_once: int = 1) -> None:
        self.seconds = seconds
        self.at_once = at_once

    def expected_seconds(self, tasks: int) -> float | None:
        return None if self.seconds is None else max(self.seconds, tasks * self.seconds / self.at_once)


async def fill(admission: Admission, limit: int = 100) -> list[Place]:
    places: list[Place] = []
    while len(places) < limit and not admission.is_full:
        place = await admission.enter()
        places.append(place)
    return places


@pytest.mark.parametrize(
    ("seconds", "at_once", "held"),
    [
        (None, 1, 4),  # nothing measured: one for each worker
        (118.0, 1, 2),  # one in work, one ready to follow
        (20.0, 4, 48),
        (20.0, 1, 12),
        (PLANNED_AGE_S + 1, 1, 1),  # late in any case, but better than nothing
    ],
)
async def test_what_is_finished_in_time_is_held(seconds: float | None, at_once: int, held: int) -> None:
    admission = Admission(Forecast(seconds, at_once), workers=4)
    places = await fill(admission)
    assert len(places) == held == admission.held
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    places[0].leave()
    places[0].leave()  # once is once
    assert (await waiting) is not None
    assert admission.held == held


async def test_room_is_given_in_order_and_not_to_those_who_have_gone() -> None:
    admission = Admission(Forecast(118.0), workers=4)
    places = await fill(admission)
    first, second, third = (asyncio.create_task(admission.enter()) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    places[0].leave()
    await second
    assert not third.done()
    third.cancel()
    await asyncio.gather(first, third, return_exceptions=True)
    places[1].leave()
    second.result().leave()
    assert admission.held == 0


async def test_room_given_to_one_who_is_cancelled_at_that_moment_is_not_lost() -> None:
    admission = Admission(Forecast(118.0), workers=4)
    places = await fill(admission)
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    places[0].leave()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    places[1].leave()
    assert admission.held == 0
