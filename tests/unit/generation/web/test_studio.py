"""Studio without a browser: what is kept, for how long, and what the page's routes answer."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from generation.web.studio import miner
from generation.web.studio.gallery import ABOUT, FILM, SPLAT, Gallery, Result
from generation.web.studio.requests import MOST_IN_PROGRESS
from tests.support.service_harness import PATIENCE_S, Service, in_thread, serving, settings, wait_until


def result(number: int, **more: Any) -> Result:
    return Result(
        id=f"r{number}", made_at=1000.0 + number, prompt="a red cube", seed=number, outcome="delivered", **more
    )


def ids(gallery: Gallery) -> list[str]:
    return [each.id for each in gallery.results()]


class TestGallery:
    def test_it_is_there_after_a_restart_the_newest_first(self, tmp_path: Path) -> None:
        gallery = Gallery(tmp_path / "g")
        for number in (1, 3, 2):
            gallery.add(result(number, parts={"iqa": None, "ssim": 0.5}), {SPLAT: b"ply"})
        gallery.add_film("r3", b"mp4")
        again = Gallery(tmp_path / "g")
        assert ids(again) == ["r3", "r2", "r1"]
        assert again.results()[0].parts == {"iqa": None, "ssim": 0.5}
        path = again.path("r3", FILM)
        assert path is not None
        assert path.read_bytes() == b"mp4"

    def test_number_and_bytes_are_bounded(self, tmp_path: Path) -> None:
        gallery = Gallery(tmp_path, most=3)
        for number in range(5):
            gallery.add(result(number), {SPLAT: b"x"})
        assert ids(gallery) == ["r4", "r3", "r2"]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["r2", "r3", "r4"]
        small = Gallery(tmp_path, most=3, most_bytes=3000)
        small.add(result(9), {SPLAT: b"x" * 2000})
        assert ids(small)[0] == "r9"
        assert sum(each.stat().st_size for each in tmp_path.rglob("*") if each.is_file()) <= 3000

    def test_what_can_not_be_read_is_left_out_and_halves_go(self, tmp_path: Path) -> None:
        gallery = Gallery(tmp_path)
        gallery.add(result(1), {SPLAT: b"x"})
        for name, content in (("bad", "{"), ("other", result(7).model_dump_json())):
            (tmp_path / name).mkdir()
            (tmp_path / name / ABOUT).write_text(content)
        (tmp_path / ".new-half").mkdir()
        assert ids(Gallery(tmp_path)) == ["r1"]
        assert not (tmp_path / ".new-half").exists()

    def test_a_folder_that_can_not_be_written_is_an_error_and_keeps_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        gallery = Gallery(tmp_path / "file" / "g")
        with pytest.raises(OSError, match="file"):
            gallery.add(result(1), {})
        assert ids(gallery) == []

    def test_a_full_disk_while_a_turntable_is_kept_costs_no_result(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gallery = Gallery(tmp_path)
        gallery.add(result(1), {SPLAT: b"x"})

        def half(path: Path, text: str) -> None:
            path.write_bytes(text[:10].encode())
            raise OSError(errno.ENOSPC, "no space left on device")

        with monkeypatch.context() as full:
            full.setattr(Path, "write_text", half)
            with pytest.raises(OSError, match="no space"):
                gallery.add_film("r1", b"mp4")
        assert gallery.path("r1", FILM) is None
        assert ids(Gallery(tmp_path)) == ["r1"]

    @pytest.mark.parametrize("name", ["about.json", "../r1/splat.ply", "turntable.mp4"])
    def test_only_its_own_files_are_named(self, tmp_path: Path, name: str) -> None:
        gallery = Gallery(tmp_path)
        gallery.add(result(1), {SPLAT: b"x"})
        assert gallery.path("r1", name) is None
        assert gallery.path("../r1", SPLAT) is None


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(max_queue=100, its_settings=settings(max_queue=100, gallery=tmp_path / "g")) as service:
        yield service


class TestRoutes:
    def test_a_request_is_made_and_kept(self, service: Service) -> None:
        answer = service.client.post("/studio/requests", data={"prompt": "a red cube", "seed": "5"})
        assert answer.status_code == 202
        request_id = answer.json()["id"]
        wait_until(lambda: service.client.get("/studio/requests").json()["results"])
        (kept,) = service.client.get("/studio/requests").json()["results"]
        assert (kept["id"], kept["prompt"], kept["seed"], kept["outcome"]) == (request_id, "a red cube", 5, "delivered")
        assert service.client.get(f"/studio/requests/{request_id}/splat.ply").content == b"ply\na red cube 5"
        assert service.client.delete(f"/studio/requests/{request_id}").status_code == 204
        assert service.client.delete(f"/studio/requests/{request_id}").status_code == 404

    def test_a_file_that_was_deleted_is_404(self, service: Service, tmp_path: Path) -> None:
        request_id = service.client.post("/studio/requests", data={"prompt": "a red cube"}).json()["id"]
        wait_until(lambda: service.client.get("/studio/requests").json()["results"])
        (tmp_path / "g" / request_id / SPLAT).unlink()
        for name in ("splat.ply", "splat.spz", "turntable.mp4"):
            assert service.client.get(f"/studio/requests/{request_id}/{name}").status_code == 404, name

    def test_splats_are_compressed_one_at_a_time(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        at_once, most = threading.Semaphore(1), []

        def compress(data: bytes) -> bytes:
            most.append(at_once.acquire(blocking=False))
            time.sleep(0.05)
            at_once.release()
            return data

        monkeypatch.setattr("common.spz.compress", compress)
        request_id = service.client.post("/studio/requests", data={"prompt": "a red cube"}).json()["id"]
        wait_until(lambda: service.client.get("/studio/requests").json()["results"])
        path = f"{service.url}/studio/requests/{request_id}/splat.spz"
        calls = [in_thread(lambda: httpx.get(path, timeout=PATIENCE_S)) for _ in range(4)]
        for thread, answers in calls:
            thread.join()
            assert answers[0].status_code == 200
        assert most == [True] * 4

    def test_listeners_are_told_of_a_cancellation_after_the_splat_was_made(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def hang(*_: Any) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(service.engine, "call", hang)  # of its picture for the gallery
        request_id = service.client.post("/studio/requests", data={"prompt": "a red cube"}).json()["id"]
        with service.client.stream("GET", f"/events/{request_id}") as events:
            lines = itertools.takewhile(lambda line: line != ": keep-alive", events.iter_lines())
            wait_until(lambda: service.engine.totals["delivered"])
            assert service.client.delete(f"/studio/requests/{request_id}").status_code == 204
            assert any('"outcome": "cancelled"' in line for line in lines)

    def test_what_the_form_may_not_hold_is_refused_as_by_generate(self, service: Service) -> None:
        for fields in ({"prompt": ""}, {"prompt": "x" * 2000}, {"prompt": "a", "seed": "-1"}, {"seed": "1"}):
            answer = service.client.post("/studio/requests", data=fields)
            assert answer.status_code == 422, fields
        assert service.client.get("/studio/requests").json()["in_progress"] == []

    def test_no_more_than_so_many_are_in_progress(self, service: Service) -> None:
        for _ in range(MOST_IN_PROGRESS):
            assert service.client.post("/studio/requests", data={"prompt": "hold"}).status_code == 202
        answer = service.client.post("/studio/requests", data={"prompt": "hold"})
        assert answer.status_code == 503
        assert answer.json()["error"]["limit"] == MOST_IN_PROGRESS

    def test_what_broke_is_told_without_the_details_of_the_error(self, service: Service) -> None:
        service.client.post("/studio/requests", data={"prompt": "crash"})
        wait_until(lambda: service.client.get("/studio/requests").json()["results"])
        (kept,) = service.client.get("/studio/requests").json()["results"]
        assert kept["outcome"] == "failed"
        assert "\n" not in kept["reason"]

    @pytest.mark.parametrize(
        "path", ["static/none.js", "static/..%2froutes.py", "requests/x/splat.ply", "requests/x/about.json",
                 "requests/..%2f..%2fx/splat.ply", "requests/x/turntable.mp4"]
    )  # fmt: skip
    def test_what_is_not_there_is_404(self, service: Service, path: str) -> None:
        assert service.client.get(f"/studio/{path}").status_code == 404

    def test_a_preview_that_is_not_there_is_no_error(self, service: Service) -> None:
        answer = service.client.get("/studio/requests/x/preview.webp")
        assert (answer.status_code, answer.content) == (204, b"")

    def test_the_page_and_its_files(self, service: Service) -> None:
        assert service.client.get("/", follow_redirects=True).text.startswith("<!doctype html>")
        for name, kind in (("studio.js", "text/javascript"), ("studio.css", "text/css"), ("icon.svg", "image/svg+xml")):
            answer = service.client.get(f"/studio/static/{name}")
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]

    def test_without_a_miner_it_says_so(self, service: Service) -> None:
        answer = service.client.get("/studio/miner")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith("No miner answers at http://127.0.0.1:9")
        assert answer.headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"{}"), (200, b"no json"), (200, b"[1]"), (200, b"[" * 100_000), (200, b" " * (miner.MOST_BYTES + 1))],
)
def test_what_is_no_miner_is_not_taken_for_one(status: int, body: bytes) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(miner.NoMiner, match="is no miner"):
            miner.activity(f"http://127.0.0.1:{server.server_port}")
        body, status = json.dumps({"at": 1}).encode(), 200
        assert miner.activity(f"http://127.0.0.1:{server.server_port}/") == {"at": 1}
        server.shutdown()
