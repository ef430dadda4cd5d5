"""Admission, continuous batching, deadlines, cancellation. Owns the only thread that uses the models and the device."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from generation.engine import gpu_memory
from generation.schema.results import Asset, Request
from generation.schema.score import in_words

if TYPE_CHECKING:  # importing it imports torch, which takes seconds: only the engine thread does that
    from generation.pipeline.pipeline import Pipeline

log = logging.getLogger("generation.engine")

#: seconds from a request's admission to its answer, at most; more than a full queue takes
TIMEOUT_S = 1800.0
LATE = f"no result within {TIMEOUT_S:.0f} s"
LOADING_RETRY_S = 5

T = TypeVar("T")
#: Called with the stage ("paused" while other requests go first) and its progress, 0..1; for a request that asks for
#: previews sometimes with a WEBP as third argument. Called from any thread. It must return quickly and must not raise.
OnProgress = Callable[..., None]


class Unavailable(Exception):
    """The engine can not take the request now. ``retry_after``: seconds; None if a retry would not help."""

    def __init__(self, message: str, retry_after: int | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StageFailed(Exception):
    """The pipeline failed on this request. Others are not affected."""


class DeadlineExceeded(Exception):
    """The request was not answered in time."""


@dataclass(eq=False, kw_only=True)
class _Entry:
    """Waits in a queue, then runs on the engine thread. Cancelling its future frees its place."""

    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Generation(_Entry):
    request: Request
    on_progress: OnProgress | None
    stage: str = "queued"
    fraction: float = 0.0

    @property
    def deadline(self) -> float | None:
        return self.request.deadline

    def progress(self, stage: str, fraction: float, *preview: bytes) -> None:
        self.stage, self.fraction = stage, fraction
        if self.on_progress is not None and not self.future.done():
            self.on_progress(stage, fraction, *preview)


@dataclass(eq=False)
class _Call(_Entry):
    """A short call, such as scoring. It runs before waiting generations."""

    function: Callable[[Pipeline], Any]
    deadline: float | None  # on time.monotonic()


class _Waiting:
    """Two queues of entries of one kind: interactive ones go before those in the background."""

    def __init__(self) -> None:
        self.interactive: deque[Any] = deque()
        self.background: deque[Any] = deque()

    def of(self, background: bool) -> deque[Any]:
        return self.background if background else self.interactive

    def __len__(self) -> int:
        return len(self.interactive) + len(self.background)

    def __iter__(self) -> Iterator[Any]:
        return iter((*self.interactive, *self.background))


class Engine:
    """Loads a pipeline and runs up to ``max_batch`` requests through it at once. They join and leave between ticks.

    Requests are interactive or in the background. Background requests are paused, and keep their state, while there are
    interactive ones.

    All public methods are for the asyncio thread. ``load`` is called on the engine thread with a function that takes
    progress as text. It returns a ``generation.pipeline.pipeline.Pipeline``, or an object with its methods: in the
    service it is ``generation.pipeline.trace.load``. ``device`` is the pipeline's: "cpu", "cuda", "cuda:1".
    """

    def __init__(
        self,
        load: Callable[[Callable[[str], None]], Any],
        max_queue: int,
        max_batch: int,
        device: str = "cpu",
    ) -> None:
        self.status = "loading"
        self.reason = "starting"
        self.models: list[dict[str, Any]] = []
        self.totals = dict.fromkeys(("requests", "delivered", "rejected", "failed", "cancelled", "refused"), 0)
        self._device = "cuda:0" if device == "cuda" else device
        self._device_name = ""  # this and the memory are known once the models are loaded
        self._memory: dict[str, int] | None = None
        self._ticks: Counter[int] = Counter()  # batch size -> number of ticks
        self._load = load
        self._max_queue, self._max_batch = max_queue, max_batch
        self._at_once = max_batch
        self._step_began: float | None = None  # on time.monotonic()
        self._calls, self._generations = _Waiting(), _Waiting()
        self._active: list[_Generation] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._mean_seconds = 30.0  # of a generation: a moving average
        # A daemon: a stage that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Fail all requests with Unavailable, and wait up to ``timeout`` seconds for the thread."""
        self._end("shutting down")
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _end(self, reason: str) -> None:
        """Take no more requests, and fail all with Unavailable."""
        with self._changed:
            self._stopping = True
            self.status, self.reason = "failed", reason
            entries: list[_Generation | _Call] = [*self._calls, *self._generations, *self._active]
            self._changed.notify_all()
        for entry in entries:
            _settle(entry, self._can_not_work())

    @property
    def queue_depth(self) -> int:
        """Number of waiting requests."""
        return len(self._generations) + len(self._calls)

    @property
    def active(self) -> list[dict[str, Any]]:
        """The running requests: seed, priority, stage (or "paused") and the progress of the stage, 0..1."""
        return [
            {
                "seed": entry.request.seed,
                "priority": priority(entry.request.background),
                "stage": entry.stage,
                "fraction": round(entry.fraction, 3),
            }
            for entry in self._active
        ]

    def health(self) -> list[dict[str, Any]]:
        """One entry per engine, of JSON types only.

        ``memory`` is from ``generation.engine.gpu_memory.measure`` after the latest tick, null on a CPU. ``ticks``
        counts ticks by batch size. ``at_once`` is the current batch limit: it is lowered after an out-of-memory error.
        ``step_seconds`` is the duration so far of the current tick or call, null between them.
        """
        return [
            {
                "device": self._device,
                "name": self._device_name,
                "status": self.status,
                "reason": self.reason,
                "active": self.active,
                "queue_depth": self.queue_depth,
                "at_once": self._at_once,
                "step_seconds": None if (began := self._step_began) is None else round(time.monotonic() - began, 1),
                "memory": self._memory,
                "ticks": {str(size): count for size, count in sorted(dict(self._ticks).items())},
            }
        ]

    def spare(self, background: bool = False) -> int:
        """How many more requests of this priority fit without delaying others.

        0 while any request waits. If several can run at once, one place is kept free for the next arrival.
        """
        with self._changed:
            if self.queue_depth or (background and self._has_interactive_work()):
                return 0
            running = sum(background or not each.request.background for each in self._active)
            return max(0, self._at_once - running - (self._at_once > 1))

    def check_admission(self, background: bool = False) -> None:
        """Raises Unavailable when ``generate`` would: while loading, after a failed load, when the queue is full.

        Interactive and background requests have queues of their own, each of the same length.
        """
        self._check_room(self._generations.of(background))

    def _check_room(self, queue: deque[Any]) -> None:
        if self.status == "loading":
            raise Unavailable(f"models are loading: {self.reason}", LOADING_RETRY_S)
        if self.status != "ready":
            raise self._can_not_work()
        if len(queue) >= self._max_queue:
            self.totals["refused"] += 1
            next_place = math.ceil(self._mean_seconds / self._max_batch)
            raise Unavailable(f"queue full: {self._max_queue} requests wait already", max(1, next_place))

    def _can_not_work(self) -> Unavailable:
        return Unavailable(f"the service can not work: {self.reason}", None)

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """Make a splat. An interactive request has a deadline TIMEOUT_S from now; a background request has none.

        Cancelling the awaiting task frees the request's place and stops its work. Raises Unavailable, DeadlineExceeded
        and StageFailed.
        """
        request = replace(request, deadline=None if request.background else time.monotonic() + TIMEOUT_S)
        entry = _Generation(request, on_progress)
        queue = self._generations.of(request.background)
        self._check_room(queue)
        self.totals["requests"] += 1
        started = time.monotonic()
        try:
            asset: Asset = await self._outcome(entry, queue)
        except asyncio.CancelledError:
            self.totals["cancelled"] += 1
            log.info("Generation cancelled: seed %d, in stage %s", request.seed, entry.stage)
            raise
        except Exception as error:
            self.totals["failed"] += 1
            log.error("Generation failed: %s", error)
            raise
        report, named = asset.report, request.prompt or "(image)"
        report.device = self._device
        if report.score is not None:
            log.info("CLIP Score: %.2f", report.parts.get("alignment", report.score))
            if report.parts:
                log.info("Score: %s", in_words(report.score, report.parts))
        if report.rejected is None:
            self.totals["delivered"] += 1
            log.info(
                "Generated %d Gaussians, %d bytes, seed %d, in %.1f s: %s",
                report.num_gaussians, len(asset.ply), request.seed, time.monotonic() - started, named,
            )  # fmt: skip
        else:
            self.totals["rejected"] += 1
            log.warning("Validation failed: %s (seed %d): %s", report.rejected, request.seed, named)
        return asset

    async def call(self, function: Callable[[Pipeline], T], background: bool = False) -> T:
        """Run ``function(pipeline)`` on the engine thread, before waiting generations of its priority.

        Raises as ``generate`` does. A ValueError of ``function`` is raised as it is: it tells what the input lacks.
        """
        queue = self._calls.of(background)
        self._check_room(queue)
        deadline = None if background else time.monotonic() + TIMEOUT_S
        return await self._outcome(_Call(function, deadline), queue)

    async def _outcome(self, entry: Any, queue: deque[Any]) -> Any:
        # A future keeps its callbacks, so this one must not know the entry: it would be in a reference cycle with its
        # result, and the garbage collector comes late. A result is tens of megabytes here, and as many on the GPU.
        def forget(future: Future[Any]) -> None:
            with self._changed:
                for waiting in [each for each in queue if each.future is future]:
                    queue.remove(waiting)

        entry.future.add_done_callback(forget)
        with self._changed:
            if self._stopping:
                raise self._can_not_work()
            queue.append(entry)
            self._changed.notify_all()
        answer: Awaitable[Any] = asyncio.wrap_future(entry.future)
        try:
            async with asyncio.timeout(None if entry.deadline is None else entry.deadline - time.monotonic()):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(LATE) from error

    # ---- engine thread ----

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # such as MemoryError; without its thread an engine would never answer
            log.exception("The engine broke")
            self._end(f"the engine broke: {describe(error)}")

    def _serve(self) -> None:
        """Load the pipeline, then run requests until the engine stops."""
        try:
            pipeline = self._load(self._progress)
            self._device_name, self._memory = gpu_memory.device_name(self._device), gpu_memory.measure(self._device)
        except BaseException as error:  # including SystemExit: a failed load must be logged
            log.exception("Loading failed")
            self.status, self.reason = "failed", f"loading failed: {describe(error)}"
            return
        self.models = pipeline.models
        for model in self.models:
            log.info("Model %s, revision %s, licence %s", *(model.get(key) for key in ("name", "revision", "licence")))
        with self._changed:
            if not self._stopping:
                self.status, self.reason = "ready", "all models are loaded"
                log.info("Ready")
        running: list[tuple[_Generation, Any]] = []  # each with its job in the pipeline
        while (work := self._next_work(pipeline.limit.current)) is not None:
            call, admitted = work
            self._step_began = time.monotonic()
            if call is not None:
                self._run_call(pipeline, call)
            running += [(generation, self._begin(pipeline, generation)) for generation in admitted]
            if running:
                running = self._tick(pipeline, running)
            self._step_began = None
            del work, call, admitted  # results must not stay in memory while the thread waits

    def _progress(self, text: str) -> None:
        self.reason = text
        log.info("Loading: %s", text)

    def _next_work(self, fitting: int) -> tuple[_Call | None, list[_Generation]] | None:
        """The next call, and the generations that join now, up to the batch limit ``fitting``. Waits while idle.

        None when the engine stops.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._calls or self._generations or self._active)
            if self._stopping:
                return None
            self._at_once = min(self._max_batch, fitting)
            # Paused generations do not count: their state is small beside the memory that a tick needs.
            running = [generation for generation in self._active if not generation.request.background]
            waiting = self._generations.interactive
            if not running and not waiting:
                running, waiting = self._active, self._generations.background
            admitted = [waiting.popleft() for _ in range(min(self._at_once - len(running), len(waiting)))]
            self._active = self._active + admitted
            calls = self._calls.interactive or (() if self._has_interactive_work() else self._calls.background)
            return (calls.popleft() if calls else None), admitted

    def _has_interactive_work(self) -> bool:
        """Whether there is an interactive generation. Then the background is paused."""
        return bool(self._generations.interactive) or any(not each.request.background for each in self._active)

    def _is_paused(self, generation: _Generation) -> bool:
        return generation.request.background and (bool(self._calls.interactive) or self._has_interactive_work())

    def _run_call(self, pipeline: Any, entry: _Call) -> None:
        try:
            outcome = entry.function(pipeline)
        except BaseException as error:  # including SystemExit, as above
            outcome = error
        _settle(entry, outcome)

    def _begin(self, pipeline: Any, generation: _Generation) -> Any:
        paused = partial(self._is_paused, generation)
        return pipeline.begin(generation.request, generation.progress, generation.future.done, paused)

    def _tick(self, pipeline: Any, running: list[tuple[_Generation, Any]]) -> list[tuple[_Generation, Any]]:
        """One tick of the pipeline. Returns the generations that are not finished."""
        if stepped := [generation for generation, _ in running if not self._is_paused(generation)]:
            self._ticks[len(stepped)] += 1
        broken: BaseException | None = None
        try:
            pipeline.tick([job for _, job in running])
        except BaseException as error:  # including SystemExit, as above
            broken = error
        self._memory = gpu_memory.measure(self._device)
        going_on, done = [], []
        for generation, job in running:
            outcome = broken if broken is not None and generation in stepped else job.outcome
            if outcome is None:
                going_on.append((generation, job))
            else:
                if isinstance(outcome, Asset):
                    self._mean_seconds += (outcome.report.total_seconds - self._mean_seconds) / 4
                done.append((generation, outcome))
        with self._changed:
            self._active = [generation for generation, _ in going_on]
        # After the update of _active: a client may ask for it as soon as it has its answer.
        for generation, outcome in done:
            _settle(generation, outcome)
        return going_on


def priority(background: bool) -> str:
    """The name of a priority in the API."""
    return "background" if background else "interactive"


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _settle(entry: _Generation | _Call, outcome: Any) -> None:
    """Resolve the entry's future with the outcome, unless it was cancelled."""
    if isinstance(outcome, BaseException) and not entry.future.done():
        own_verdict = isinstance(outcome, Unavailable) or (isinstance(outcome, ValueError) and isinstance(entry, _Call))
        if not own_verdict:
            log.error("A request failed", exc_info=outcome)
            late = entry.deadline is not None and time.monotonic() >= entry.deadline
            failure = DeadlineExceeded(LATE) if late else StageFailed(describe(outcome))
            failure.__cause__ = outcome
            outcome = failure
    _drop_frames(outcome)
    with contextlib.suppress(InvalidStateError):  # cancelled at this moment
        if isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)


def _drop_frames(outcome: Any) -> None:
    """Drop the tracebacks of an error and of its causes.

    A request's error has the frames of the tick that it comes from, and these have all jobs of that tick, and so the
    error: a cycle that would keep their tensors until the garbage collector comes. Cancelled requests have one, too.
    """
    errors, known = [outcome], set[int]()
    while errors:
        error = errors.pop()
        if isinstance(error, BaseException) and id(error) not in known:
            known.add(id(error))
            error.__traceback__ = None
            errors += [error.__cause__, error.__context__]
