"""The service's side of a Ray cluster: engines that run as actors, and the fleet of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

from generation.fleet import remote
from generation.fleet.actor import software
from generation.fleet.cluster import Cluster, Machine, error_in_words
from generation.fleet.fleet import LOADER, Fleet
from generation.fleet.messages import Broken, Resolve, Resolved
from generation.fleet.ray_environment import ENGINE
from generation.fleet.remote import NotStarted, RemoteEngine

#: Seconds between checks of which machines there are.
LOOK_S = 1.0
#: Seconds within which the head has to answer such a check.
HEAD_ANSWERS_S = 5.0
#: Seconds that requests wait for a machine after the last one has left: its keeper restarts it.
MACHINE_BACK_S = 120.0

log = logging.getLogger("generation.fleet.actors")


class ActorLink:
    """Carries messages to an actor and back. For the asyncio thread."""

    def __init__(self, actor: Any, first: Resolve) -> None:
        self.cause = ""  # why the link ended, in words
        self.process: int | None = None
        self._actor, self._first = actor, first
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._work: asyncio.Task[None]

    def start(self, on_message: Callable[[Any], object], on_end: Callable[[], object]) -> None:
        async def work() -> None:
            theirs, self.process = await self._actor.about.remote()
            if theirs != software():
                on_message(Broken(f"its machine has {theirs}, and this service is {software()}"))
                return
            await self._actor.begin.remote(pickle.dumps(self._first))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell())
                group.create_task(self._collect(on_message))
                group.create_task(self._follow(on_message))

        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                self.cause = error_in_words(error)
            on_end()

        self._work = asyncio.get_running_loop().create_task(work())
        self._work.add_done_callback(end)

    def send(self, message: Any) -> None:
        self._outgoing.put_nowait(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        self._work.cancel()

    async def _tell(self) -> None:
        while True:  # one call at a time: Ray does not keep the order of calls of an asyncio actor
            await self._actor.tell.remote(await self._outgoing.get())

    async def _collect(self, on_message: Callable[[Any], object]) -> None:
        while True:
            for data in await self._actor.collect.remote():
                on_message(pickle.loads(data))

    async def _follow(self, on_message: Callable[[Any], object]) -> None:
        """Collect states apart from results: a large result on a slow network must not look like a hanging engine."""
        while True:
            on_message(pickle.loads(await self._actor.state.remote()))


class ActorEngine(RemoteEngine):
    """An engine as an actor on ``machine``. ``first`` resolves its settings there; ``accept`` says why to refuse it."""

    silent_checks = 10  # nothing else notices a cut cable

    def __init__(
        self,
        device: str,
        cluster: Cluster,
        machine: Machine,
        first: Resolve,
        accept: Callable[[Any], str],
        changed: Callable[[], None],
    ) -> None:
        super().__init__(device, machine.address, 1, changed)
        self._cluster, self._machine, self._first, self._accept = cluster, machine, first, accept
        self._actor: Any = None
        self._ours: ActorLink | None = None

    def _launch(self) -> ActorLink:
        self._set(
            "loading",
            f"starting on {self.machine}, where it waits for a free {'GPU' if self._machine.has_gpu else ENGINE}",
        )
        try:
            self._actor = self._cluster.begin(self._machine)
        except Exception as error:
            raise NotStarted(error_in_words(error)) from error
        if self._ours is not None and self._ours.process is not None:
            self._first = replace(self._first, after=self._ours.process)
        self._ours = ActorLink(self._actor, self._first)
        return self._ours

    def _has_ended(self) -> bool:
        return False  # the link ends with the process

    async def _finish(self) -> None:
        with suppress(Exception):  # the actor is dead, or its machine is cut off
            self._cluster.end(self._actor)
            async with asyncio.timeout(remote.ENDING_S):
                while True:
                    await self._actor.about.remote()
                    await asyncio.sleep(0.02)

    def _cause(self) -> str:
        return (self._ours is not None and self._ours.cause) or "it ended"

    def _take(self, message: Any) -> None:
        if isinstance(message, Resolved) and not self._broken:
            self.memory_class = getattr(message.settings, "memory_class", None)
            why = getattr(message.settings, "memory_reason", "")
            log.info("Engine on %s: memory class %s: %s", self.device, self.memory_class or "none", why)
            if problem := self._accept(message.settings):
                self.end(problem)
        else:
            super()._take(message)


class ClusterFleet(Fleet):
    """A fleet of all engines of a cluster, whose machines come and go.

    ``resolve`` must be picklable: it is called on each engine's machine, and returns its
    ``generation.settings.Settings``. ``loader`` is "module:function". The first engine's settings become ``resolved``;
    engines whose settings would make another splat of the same request are refused.
    """

    def __init__(self, cluster: Cluster, resolve: Callable[[], Any], max_queue: int, loader: str = LOADER) -> None:
        super().__init__({})
        self._max_queue = max_queue
        self._cluster, self._resolve, self._loader = cluster, resolve, loader
        software()  # cached now, since the code on disk may change later
        self._machines: dict[Machine, list[ActorEngine]] = {}
        self._emptied = time.monotonic()
        self._looking: asyncio.Task[None]

    def start(self) -> None:
        super().start()
        self._looking = self._loop.create_task(self._look())

    async def _stop(self) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        await super()._stop()

    @property
    def reason(self) -> str:
        if not self._engines and not self._stopping:
            return "no machine of the cluster has an engine: none with a GPU has joined"
        return super().reason

    def _can_wait(self) -> bool:
        return super()._can_wait() or (not self._engines and time.monotonic() - self._emptied < MACHINE_BACK_S)

    async def _look(self) -> None:
        while True:
            for machine in self._machines.keys() - (now := await self._there()):
                self._leave(machine)
            for machine in now:
                if machine not in self._machines:
                    self._join(machine)
            if not self._engines:
                self._hand_out()  # fails requests that have waited too long
            await asyncio.sleep(LOOK_S)

    async def _there(self) -> Collection[Machine]:
        """The machines as the head lists them, or as it did when it last answered."""
        asked = asyncio.ensure_future(asyncio.to_thread(self._cluster.machines))
        done, _ = await asyncio.wait([asked], timeout=HEAD_ANSWERS_S)
        if not done:
            log.error(
                "The cluster's head has not answered for %.0f s; where it stays away, Ray ends this process",
                HEAD_ANSWERS_S,
            )
        try:
            return await asked
        except Exception as error:
            log.error("The cluster's head does not say which machines there are: %s", error_in_words(error))
            return self._machines

    def _join(self, machine: Machine) -> None:
        log.info("Machine %s has joined, with %d engines", machine.address, machine.engines)
        first = Resolve(self._resolve, self._loader, threads=max(1, machine.cores // machine.engines))
        place = f"{machine.address}/{'gpu' if machine.has_gpu else 'cpu'}"
        taken = {engine.device for engine in self._engines}  # the same machine may be back before its old node has left
        free = (name for number in itertools.count() if (name := f"{place}{number}") not in taken)
        self._machines[machine] = [
            ActorEngine(device, self._cluster, machine, first, self._check, self._hand_out)
            for device in itertools.islice(free, machine.engines)
        ]
        for engine in self._machines[machine]:
            self._add(engine)

    def _leave(self, machine: Machine) -> None:
        log.error("Machine %s has left, with %d engines", machine.address, machine.engines)
        for engine in self._machines.pop(machine):
            if len(self._engines) == 1:
                self._emptied = time.monotonic()
            self._remove(engine, "its machine has left the cluster")

    def _check(self, settings: Any) -> str:
        if self.resolved is None:
            self.resolved = settings
        ours, theirs = _decisive(self.resolved), _decisive(settings)
        different = [name for name in ours if ours[name] != theirs[name]]
        return f"its settings make other splats than the first engine's: {', '.join(different)}" if different else ""


def _decisive(settings: Any) -> dict[str, Any]:
    """Settings, by name, that must be equal on all engines. Memory classes only change speed and rounding."""
    parts = getattr(settings.models, "score_parts", None)  # these depend on which optional weights are there
    own = {name: getattr(settings, name, None) for name in ("profile", "device", "options", "image_options")}
    return {**own, "parts of the score": parts}
