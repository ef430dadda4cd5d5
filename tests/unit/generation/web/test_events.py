"""Following requests while they run, over real HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from generation.web import events as events_module
from generation.web.events import Events
from generation.web.time_left import TimeLeft
from tests.support.service_harness import PATIENCE_S, Service, serving, wait_until

PROMPT = "a very secret cube"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


class Follower:
    """Reads a stream until it ends. It listens by the time that it is made."""

    def __init__(self, service: Service, path: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self._url = service.url + path
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_until(lambda: self.text)

    def _read(self) -> None:
        with httpx.stream("GET", self._url, timeout=PATIENCE_S) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["x-accel-buffering"] == "no"  # nginx: ngx_http_proxy_module, proxy_buffering
            for line in response.iter_lines():
                self.text += line + "\n"
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.events.append((kind, json.loads(line.removeprefix("data: "))))

    def end(self) -> dict[str, Any]:
        """The last event, when the server has closed the stream."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream did not end"
        kind, about = self.events[-1]
        assert kind == "end"
        return about

    def progress(self) -> list[dict[str, Any]]:
        return [about for kind, about in self.events if kind == "progress"]


def post(service: Service, request_id: str, prompt: str = PROMPT, path: str = "/generate/", **fields: str) -> Any:
    return httpx.post(
        service.url + path, data={"prompt": prompt, **fields}, headers={"X-Request-Id": request_id}, timeout=PATIENCE_S
    )


def in_background(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def events_of(service: Service) -> Events:
    return service.server.config.app.state.events  # type: ignore[union-attr]


def test_a_request_is_followed_from_its_queue_to_its_end(service: Service) -> None:
    follower = Follower(service, "/events/mine-1")
    answer = post(service, "mine-1")
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert follower.end() == {"request_id": "mine-1", "outcome": "delivered", "score": 0.7654, "reason": None}
    progress = follower.progress()
    assert [each["stage"] for each in progress] == ["receiving", "queued", "text_to_image", "dreamgaussian"]
    assert all(each["request_id"] == "mine-1" for each in progress)
    assert (progress[2]["fraction"], progress[3]["fraction"]) == (0.5, 0.25)
    assert "secret" not in follower.text


def test_the_time_left_is_null_until_it_was_measured() -> None:
    with serving() as service:
        seen = []
        for request_id in ("first", "second"):
            follower = Follower(service, f"/events/{request_id}")
            post(service, request_id)
            assert follower.end()["outcome"] == "delivered"
            seen.append({each["stage"]: each["eta_seconds"] for each in follower.progress()})
    assert seen[0] == dict.fromkeys(("receiving", "queued", "text_to_image", "dreamgaussian"))
    assert seen[1]["queued"] is None
    assert 0 <= seen[1]["text_to_image"] < PATIENCE_S


def test_a_pause_is_told_once_and_is_no_time_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(events_module.time, "monotonic", lambda: now[0])
    events = Events()
    publish = events.publish

    def publish_and_tell(following: events_module.Following, kind: str, about: dict[str, Any]) -> None:
        told.append(about)
        publish(following, kind, about)

    monkeypatch.setattr(events, "publish", publish_and_tell)

    def run(request_id: str, pause: float, background: bool) -> None:
        with events.request(request_id, background) as following:
            following.queued("text")
            following.progress("dreamgaussian", 0.0)
            for _ in range(3 if pause else 0):
                following.progress("paused", 0.0)
            now[0] += pause
            following.progress("dreamgaussian", 0.5)
            now[0] += 10
            following.end("delivered", None, 0.7)

    run("first", 0.0, False)
    told.clear()
    run("paused", 500.0, True)
    stages = [(each.get("stage"), each.get("eta_seconds")) for each in told[2:]]
    assert stages == [("dreamgaussian", 10.0), ("paused", None), ("dreamgaussian", 10.0), (None, None)]
    assert told[0]["priority"] == "background"
    told.clear()
    run("third", 0.0, False)
    assert told[2]["eta_seconds"] == 10.0
    assert told[0]["priority"] == "interactive"


@pytest.mark.parametrize(
    ("prompt", "outcome", "score", "reason"),
    [
        ("reject", "rejected", 0.21, "CLIP score 0.21 is under 0.6 \u2014\nX-Evil: 1"),
        ("crash", "failed", None, "stage text_to_image failed"),
        ("", "refused", None, "empty"),
    ],
)
def test_the_end_says_what_became_of_it(
    service: Service, prompt: str, outcome: str, score: float | None, reason: str
) -> None:
    follower = Follower(service, "/events/x")
    answer = post(service, "x", prompt)
    assert answer.headers["X-Request-Id"] == "x"  # on errors too
    assert follower.end() == {"request_id": "x", "outcome": outcome, "score": score, "reason": reason}


def test_who_comes_later_is_told_at_once_how_far_it_is() -> None:
    with serving() as service:
        gone = in_background(lambda: impatient(service))
        wait_until(lambda: service.engine.active)
        follower = Follower(service, "/events/held")
        wait_until(lambda: follower.progress())
        assert follower.progress()[0]["stage"] == "text_to_image"
        gone.join(PATIENCE_S)
        assert (follower.end()["outcome"], follower.end()["reason"]) == ("cancelled", "the client hung up")


def impatient(service: Service) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(service.url + "/generate/", data={"prompt": "hold"}, headers={"X-Request-Id": "held"}, timeout=0.5)


def test_all_requests_are_followed_together(service: Service) -> None:
    follower = Follower(service, "/events")
    generated = service.generate(PROMPT).headers["X-Request-Id"]  # no id given
    post(service, "b", "reject")
    wait_until(lambda: sum(kind == "end" for kind, _ in follower.events) == 2)
    ends = {about["request_id"]: about["outcome"] for kind, about in follower.events if kind == "end"}
    assert ends == {generated: "delivered", "b": "rejected"}
    assert len(generated) == 16
    assert "secret" not in follower.text


def test_a_film_is_a_stage_of_its_own(service: Service) -> None:
    follower = Follower(service, "/events/film")
    failed = post(service, "film", path="/generate_video/")  # the stand-in has no Gaussians to film
    assert failed.status_code == 500
    assert (follower.end()["outcome"], follower.end()["reason"]) == ("failed", "stage video failed")


def test_an_id_is_one_request_at_a_time_and_free_afterwards() -> None:
    with serving() as service:
        first = in_background(lambda: post(service, "one", "hold"))
        wait_until(lambda: service.engine.active)
        refused = post(service, "one")
        assert (refused.status_code, refused.json()["error"]["field"]) == (409, "X-Request-Id")
        service.pipeline.go.set()
        first.join(PATIENCE_S)
        assert post(service, "one").status_code == 200


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 65, "a/b", "<script>", "\u00e9"])
def test_a_bad_id_is_refused(service: Service, request_id: str) -> None:
    refused = httpx.post(
        service.url + "/generate/", data={"prompt": "a"}, headers=[(b"X-Request-Id", request_id.encode())]
    )
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "X-Request-Id")
    assert "64" in refused.json()["error"]["limit"]
    assert "X-Request-Id" not in refused.headers
    if request_id not in ("", "a/b"):
        assert service.client.get(f"/events/{request_id}").status_code == 422


def test_a_request_that_does_not_come_is_not_waited_for_long(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_WAIT_S", 0.05)
    end = Follower(service, "/events/never").end()
    assert end["outcome"] == "unknown"
    assert "no request with this id" in end["reason"]


def test_listeners_are_limited_and_their_places_come_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LISTENERS", 1)
    with serving() as service:
        with httpx.stream("GET", service.url + "/events") as response:
            assert response.status_code == 200
            refused = service.client.get("/events/other")
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert "1 listeners" in refused.json()["error"]["message"]
        wait_until(lambda: not events_of(service)._listeners)  # a client that leaves gives up its place
        follower = Follower(service, "/events/z")
        post(service, "z")
        assert follower.end()["outcome"] == "delivered"


def test_a_quiet_stream_is_kept_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "KEEP_ALIVE_S", 0.02)
    follower = Follower(service, "/events/quiet")
    wait_until(lambda: ": keep-alive\n" in follower.text)
    post(service, "quiet")
    assert follower.end()["outcome"] == "delivered"


async def test_a_slow_listener_loses_the_oldest_progress_and_no_end() -> None:
    events = Events()
    with events.listen(None) as listener:
        for number in range(1000):
            with events.request(f"r{number}") as following:
                following.progress("text_to_image", 0.0)
                if number % 10 == 0:
                    following.end("delivered", None)
        async with listener.patience:
            stream = listener.stream()
            assert await anext(stream) == b": listening\n\n"
            got = (await anext(stream)).decode().split("\n\n")[:-1]
            await stream.aclose()
    assert len(got) == events_module.MAX_PENDING
    ends = [event for event in got if event.startswith("event: end")]
    assert len(ends) == 100
    assert '"r999"' in got[-1]
    assert not any('"r1"' in event for event in got)


def test_a_stalled_listener_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(events_module, "MAX_STALL_S", 0.2)
    with serving() as service, stalled(service):
        wait_until(lambda: not events_of(service)._listeners)
        assert service.generate().status_code == 200


def stalled(service: Service) -> socket.socket:
    """A client that asks for all events and reads none of the many that there are then."""
    host, port = service.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    events = events_of(service)
    wait_until(lambda: events._listeners)
    with events.request("big") as following:
        deadline = time.monotonic() + PATIENCE_S
        while any(len(each._pending) < 30 for each in list(events._listeners)):  # until nothing is taken any more
            assert time.monotonic() < deadline
            events.publish(following, "progress", {"filler": "x" * 200_000})
            time.sleep(0.002)
    return client


def test_listening_ends_before_the_requests_that_are_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "STOP_S", 0.05)
    with serving() as service, stalled(service):
        service.server.config.timeout_graceful_shutdown = int(PATIENCE_S)
        answers: list[httpx.Response] = []
        held = in_background(lambda: answers.append(post(service, "held", "hold")))
        wait_until(lambda: service.engine.active)
        followers = [Follower(service, path) for path in ("/events", "/events/held", "/events/none")]
        service.server.should_exit = True
        for follower in followers:
            end = follower.end()
            assert (end["outcome"], end["reason"]) == ("unknown", "the service is shutting down")
        wait_until(lambda: len(service.server.server_state.tasks) == 1)  # the stalled listener is left, too
        service.pipeline.go.set()
        held.join(PATIENCE_S)
        assert answers[0].status_code == 200


async def test_nothing_follows_an_end() -> None:
    events = Events()
    with events.listen("a") as listener, events.request("a") as following:
        following.queued("text")
        following.end("failed", "no result within 1 s")
        following.progress("dreamgaussian", 0.5)
        async with listener.patience:
            got = b"".join([chunk async for chunk in listener.stream()])
    assert (got.count(b"event: progress"), got.count(b"event: end")) == (2, 1)  # receiving, queued


def test_time_left_follows_the_mean_of_earlier_requests_of_the_kind() -> None:
    times = TimeLeft()
    for duration in (10.0, 14.0):
        trip = times.begin("text")
        trip.reached("dreamgaussian", 0.0, 0.0)
        trip.reached("dreamgaussian", 0.51, duration - 4)
        trip.reached("dreamgaussian", 0.55, duration - 2)  # the same tenth: its first moment counts
        trip.finished(duration)
    trip = times.begin("text")
    assert trip.reached("dreamgaussian", 0.0, 100.0) == 11.0
    assert trip.reached("dreamgaussian", 0.05, 103.0) == 8.0
    assert trip.reached("dreamgaussian", 0.3, 105.0) is None  # nobody was seen here
    assert trip.reached("dreamgaussian", 0.5, 120.0) == 4.0
    assert trip.reached("dreamgaussian", 0.59, 130.0) is None  # late: not known any more
    assert times.begin("image").reached("dreamgaussian", 0.0, 0.0) is None


def test_a_request_that_ends_early_teaches_nothing() -> None:
    times = TimeLeft()
    times.begin("text").reached("background", 0.0, 0.0)
    assert times.means == {}
