"""Studio as a person uses it: a real browser, the real service, a stand-in for the models."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from generation.engine.engine import Engine
from generation.pipeline import preview
from generation.pipeline.job import Job
from generation.schema.results import Asset, Cancelled, Report, Request
from generation.splats import ply
from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from generation.web import turntable
from neurons.miner.records.activity import Activity, Identity
from neurons.miner.records.metrics import Metrics, Snapshot
from tests.support.browser import chromium, until
from tests.support.ledger_events import NOW, one_task, write
from tests.support.service_harness import serving_engine, settings, wait_until
from tests.support.standins import ball

pytestmark = pytest.mark.slow

SIZE = 512
TICKS = 4
GENERATOR = "clay"  # the page knows no generator by name
LEAST_DB = 45.0  # between the page's renderer and ours


def scene() -> Gaussians:
    """A red ball with a green one to its right and a blue one on top, of 8,000 Gaussians each, some transparent."""
    parts = [ball("red", radius=0.4), ball("green", radius=0.2, seed=1), ball("blue", radius=0.15, seed=2)]
    parts[1].means += torch.tensor([0.5, 0.0, 0.1])
    parts[2].means += torch.tensor([0.0, 0.5, 0.2])
    parts[2].logit_opacities -= 4.5
    whole = Gaussians(*(torch.cat(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))
    whole.log_scales += torch.linspace(-0.8, 0.3, 3)  # no spheres
    return whole


class Painter:
    """Makes ``scene`` in a few ticks. Other prompts: "poor" scores 0.3, "hold" goes on until ``go``, "crash"."""

    models: list[dict[str, Any]] = []  # noqa: RUF012
    limit = SimpleNamespace(current=8)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[Request] = []
        self._ply = ply.write(scene())

    def begin(self, request: Request, progress: Any, cancelled: Any, paused: Any) -> Job:
        self.asked.append(request)
        job = Job(request, progress, cancelled, Report(request.seed), paused)
        job.image = 0  # type: ignore[assignment]  # ticks so far
        return job

    def tick(self, jobs: list[Job]) -> None:
        threading.Event().wait(0.02)
        for job in jobs:
            job.outcome = self._one(job)

    def _one(self, job: Job) -> Asset | Exception | None:
        if job.cancelled():
            return Cancelled("given up")
        ticks: Any = job.image
        job.image = ticks + 1
        job.progress(GENERATOR, min(ticks / TICKS, 0.95))
        job.preview(GENERATOR, min(ticks / TICKS, 0.95), lambda: preview.of_gaussians(scene()))
        if job.request.prompt == "hold" and not self.go.is_set():
            return None
        if ticks < TICKS:
            return None
        if job.request.prompt == "crash":
            return RuntimeError("the stage broke")
        assert job.request.watched
        score = 0.3 if job.request.prompt == "poor" else 0.9
        report = Report(job.request.seed, score, {"alignment": score, "ssim": 0.8, "iqa": None}, num_gaussians=24_000)
        report.seconds = {GENERATOR: 1.5}
        report.rejected = "score 0.30 is under the threshold 0.60" if score < job.request.threshold else None
        return Asset(self._ply, report)


def keep(page: Any, name: str) -> None:
    """A screenshot, for people, in the folder that STUDIO_SCREENSHOTS names."""
    if folder := os.environ.get("STUDIO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


class Studio:
    def __init__(self, url: str, painter: Painter, browser: Any, folder: Path) -> None:
        self.url, self.painter, self.folder = url, painter, folder
        self.requested: list[str] = []
        self.problems: list[str] = []
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._said)
        self.open()

    def _said(self, message: Any) -> None:
        if message.type == "error" and ("Content Security Policy" in message.text or "404" in message.text):
            self.problems.append(f"{message.text} {message.location['url']}")

    def open(self) -> None:
        self.page.goto(f"{self.url}/studio/")

    def make(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#go")

    def results(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.url}/studio/requests").json()["results"])

    def drawn(self) -> bool:
        """Whether a picture in the right order is there."""
        return bool(self.page.evaluate("studio.view.ready > 0 && !studio.view.asked && !studio.view.sorting"))

    def pixels(self) -> NDArray[np.float32]:
        """What the canvas shows, once it is drawn in the right order: (H, W, 3) in 0..255."""
        until(self.drawn, "a picture")
        data = self.page.evaluate("document.getElementById('view').toDataURL('image/png')")
        picture = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))
        return np.asarray(picture.convert("RGB"), dtype=np.float32)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def studio(browser: Any, tmp_path: Path) -> Iterator[Studio]:
    painter = Painter()
    engine = Engine(lambda progress: painter, 16, 8)
    with serving_engine(engine, 16, settings(max_queue=16, gallery=tmp_path / "gallery")) as (url, _):
        wait_until(lambda: engine.status == "ready")
        studio = Studio(url, painter, browser, tmp_path / "gallery")
        try:
            yield studio
        finally:
            painter.go.set()
            studio.page.context.close()
        origin = urlsplit(url).netloc
        assert {urlsplit(each).netloc for each in studio.requested if not each.startswith(("blob:", "data:"))} == {
            origin
        }
        assert studio.problems == []


def test_a_prompt_becomes_a_splat_that_turns_and_is_downloaded(studio: Studio) -> None:
    studio.page.fill("#seed", "7")
    studio.make("a <b>red</b> ball")
    until(studio.results, "a result")
    before = studio.pixels()
    assert studio.page.inner_text("#about b") == "a <b>red</b> ball"
    assert "0.900" in studio.page.inner_text("#about")
    keep(studio.page, "make")
    (asked,) = studio.painter.asked
    assert (asked.prompt, asked.seed, asked.background) == ("a <b>red</b> ball", 7, False)
    box = studio.page.locator("#view").bounding_box()
    studio.page.mouse.move(box["x"] + 300, box["y"] + 200)
    studio.page.mouse.down()
    studio.page.mouse.move(box["x"] + 420, box["y"] + 240, steps=5)
    studio.page.mouse.up()
    after = studio.pixels()
    assert np.abs(after - before).mean() > 2
    studio.page.focus("#view")
    studio.page.keyboard.press("f")
    assert np.abs(studio.pixels() - before).max() <= 2
    studio.page.keyboard.press("ArrowLeft")
    assert np.abs(studio.pixels() - before).mean() > 1
    studio.page.keyboard.press("f")
    studio.page.set_viewport_size({"width": 240, "height": 844})
    until(lambda: studio.pixels().shape[1] < 240, "a narrow picture")
    assert (studio.pixels()[:, [0, -1]] == 255).all()  # nothing is cut off
    with studio.page.expect_download() as download:
        studio.page.click("text=PLY")
    assert Path(download.value.path()).read_bytes() == ply.write(scene())
    assert download.value.suggested_filename == "a-b-red-b-ball.ply"


def test_the_page_draws_as_the_rasteriser_does(studio: Studio) -> None:
    studio.make("three balls")
    until(studio.results, "a result")
    studio.page.evaluate(
        "() => { const c = document.getElementById('view'); c.style.width = c.style.height = '512px'; "
        "studio.view.pixelRatio = 1; }"
    )
    gaussians = ply.read(ply.write(scene()))
    low, high = gaussians.means.amin(0), gaussians.means.amax(0)
    radius = turntable.DISTANCE * (high - low).max().item()
    for azimuth, elevation, behind in (
        (0, 15, (1.0, 1.0, 1.0)),
        (130, -20, (0.0, 0.0, 0.0)),
        (250, 60, (0.5, 0.5, 0.5)),
    ):
        studio.page.evaluate(
            "([azimuth, elevation, behind]) => { studio.view.background = behind; "
            "studio.view.look({ azimuth, elevation }); }",
            [azimuth, elevation, behind],
        )
        shown = studio.pixels()
        camera = orbit(
            elevation, azimuth, radius, turntable.FOVY, SIZE, SIZE, target=tuple(((low + high) / 2).tolist())
        )
        rgb, _, _ = rasterize(gaussians, camera, SIZE, SIZE, torch.tensor(behind))
        wanted = (rgb[0].clamp(0, 1) * 255).numpy()
        assert shown.shape == wanted.shape
        assert 10 * np.log10(255**2 / ((shown - wanted) ** 2).mean()) > LEAST_DB


def test_what_is_rejected_is_shown_with_its_reason(studio: Studio) -> None:
    studio.make("poor")
    until(studio.results, "a result")
    studio.pixels()
    assert "score 0.30 is under the threshold 0.60" in studio.page.inner_text("#about")
    studio.make("crash")
    until(lambda: len(studio.results()) == 2, "a second result")
    until(lambda: "failed" in studio.page.inner_text("#about"), "the failure on the page")
    studio.page.click("[data-show=rejected]")
    keep(studio.page, "rejected")
    assert studio.page.locator("#results .caption").all_inner_texts() == ["poor\nrejected, 0.30"]
    studio.page.focus("#results button")
    studio.page.keyboard.press("Enter")
    assert studio.page.evaluate("document.activeElement.dataset.id") == studio.results()[1]["id"]


def test_events_are_asked_for_again_after_an_answer_of_a_proxy(studio: Studio) -> None:
    """With any other status than 200 browsers give up."""
    refused: list[Any] = []

    def once(route: Any) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route)
            route.fulfill(status=502)

    studio.page.route("**/events", once)
    studio.open()
    until(lambda: studio.page.title() and refused, "a refusal")  # routes are served while the page is asked
    studio.make("a red ball")
    until(lambda: studio.page.locator("#results button").count() == 1, "the result on the page", 20)


def test_three_at_once_go_on_when_the_page_is_loaded_anew(studio: Studio) -> None:
    for _ in range(3):
        studio.make("hold")
    until(lambda: len(studio.painter.asked) == 3, "three requests")
    until(lambda: studio.page.locator(".making").count() == 3, "three in progress")
    until(lambda: "making the splat" in studio.page.locator(".making").first.inner_text(), "the stage in words")
    studio.open()
    until(lambda: studio.page.locator(".making").count() == 3, "three in progress")
    until(lambda: studio.page.locator(".making img:not([hidden])").count() == 3, "what they look like so far")
    assert studio.page.evaluate("document.querySelector('.making img').naturalWidth") == preview.SIDE
    studio.page.locator(".making button").first.click()
    until(lambda: studio.page.locator(".making").count() == 2, "one is cancelled")
    assert httpx.get(f"{studio.url}/health").json()["totals"]["cancelled"] == 1
    studio.painter.go.set()
    until(lambda: len(studio.results()) == 2, "two results")
    until(lambda: studio.page.locator("#results button").count() == 2, "two in the gallery")


def test_the_best_of_several_is_shown_with_all_scores(studio: Studio) -> None:
    studio.page.select_option("#candidates", "4")
    studio.make("a red ball")
    (result,) = until(studio.results, "a result")
    assert len({request.seed for request in studio.painter.asked}) == len(result["candidates"]) == 4
    until(lambda: "0.90, 0.90, 0.90, 0.90" in studio.page.inner_text("#about"), "all scores on the page")


def test_a_picture_is_dropped(studio: Studio) -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    studio.page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), files = new DataTransfer();
            files.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: files, bubbles: true });
            document.getElementById("drop").dispatchEvent(event);
        }""",
        data,
    )
    assert studio.page.is_visible("#picture-shown")
    studio.page.click("#go")
    until(studio.results, "a result")
    (asked,) = studio.painter.asked
    assert asked.prompt is None
    assert asked.image is not None
    assert asked.image.size == (40, 30)
    until(lambda: studio.page.inner_text("#about b") == "a picture", "the result on the page")


def test_the_film_is_made_of_the_splat_that_is_kept(studio: Studio) -> None:
    studio.make("three balls")
    (result,) = until(studio.results, "a result")
    film = httpx.get(f"{studio.url}/studio/requests/{result['id']}/turntable.mp4", timeout=60)
    assert film.content[4:8] == b"ftyp"
    assert len(studio.painter.asked) == 1
    assert (studio.folder / result["id"] / "turntable.mp4").read_bytes() == film.content


def test_no_other_site_and_no_other_name_reaches_it(studio: Studio) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for method, path in (("GET", "/studio/"), ("GET", "/studio/requests"), ("POST", "/studio/requests")):
            answer = httpx.request(method, studio.url + path, headers=headers)
            assert answer.status_code in (403, 421)
    policy = httpx.get(f"{studio.url}/studio/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_miners_page_shows_what_its_ledger_says(browser: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    events = one_task(1, NOW - 600, score=0.91, reward=10) + one_task(1, NOW - 300, accepted=False, reward=10)
    write(ledger, events + one_task(2, NOW - 200, score=0.83, reward=20))
    metrics = Metrics()
    moment = Snapshot(queued=1, ages=[12.0], cooldowns={1: 250.0}, endpoints={"http://127.0.0.1:10006": False})
    metrics.show(
        replace(moment, clock_behind=-9.0, status="ready", held=[(2, "image", 12.0)], uid=42, incentive=0.0125)
    )
    port = metrics.serve(0, Activity(Identity("5Hot", "finney", 17), ledger, lambda: NOW).as_json)
    engine = Engine(lambda progress: Painter(), 16, 8)
    miner_url = f"http://127.0.0.1:{port}"
    its_settings = settings(max_queue=16, gallery=tmp_path / "gallery", miner_url=miner_url)
    with serving_engine(engine, 16, its_settings) as (url, _):
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto(f"{url}/studio/#miner")
        until(lambda: page.locator(".tile").count() == 6, "the miner's figures")
        tiles = page.locator(".tile b").all_inner_texts()
        assert tiles == ["2", "30", "0.870", "1", "1", "0"]
        assert "5Hot on finney, subnet 17, UID 42, incentive 0.01250 (its share" in page.inner_text("#miner")
        assert "clock is 9 s ahead of the validators" in page.inner_text("#miner")
        assert "No generation service can take a task" in page.inner_text("#miner")
        validators = page.locator("table").first.locator("tbody tr").all_inner_texts()
        assert [row.split("\t")[4:5] + row.split("\t")[8:] for row in validators] == [
            ["1", "1.0", "–"],
            ["0", "1.0", "–"],
        ]
        rows = page.locator("#outcomes tbody tr").all_inner_texts()
        assert sorted(row.split("\t")[1:4] for row in rows) == [
            ["UID 1", "accepted", "0.910"], ["UID 1", "declined", "–"], ["UID 2", "accepted", "0.830"],
        ]  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        keep(page, "miner-on-a-phone")
        table = page.locator("section", has=page.get_by_role("heading", name="Validators"))
        table.evaluate("each => { each.scrollLeft = 150; }")
        metrics.show(replace(moment, cooldowns={1: 70.0}))
        until(lambda: "70 s" in table.inner_text(), "the next figures")
        assert table.evaluate("each => each.scrollLeft") == 150
        page.set_viewport_size({"width": 1280, "height": 900})
        keep(page, "miner")
        page.set_viewport_size({"width": 390, "height": 800})
        page.click("#tab-make")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.set_viewport_size({"width": 740, "height": 360})  # there is room to scroll by
        assert page.locator("#stage").bounding_box()["height"] <= 0.6 * 360
        assert page.get_attribute("#tab-make", "aria-current") == "page"
        metrics.close()
        page.click("#tab-miner")
        until(lambda: "No miner answers at" in page.inner_text("#miner"), "word that no miner runs")
        page.set_viewport_size({"width": 320, "height": 640})
        page.goto(f"{url}/docs")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.close()


def test_what_ends_before_its_id_is_known_is_shown(studio: Studio) -> None:
    def late(route: Any) -> None:
        if route.request.method == "POST":
            answer = route.fetch()
            until(studio.results, "a result")
            route.fulfill(response=answer)
        else:
            route.continue_()

    studio.page.route("**/studio/requests", late)
    studio.make("crash")
    until(lambda: "failed" in studio.page.inner_text("#about"), "the failure on the page", 20)
    assert studio.page.locator(".making").count() == 0


def test_who_leaves_the_miners_page_leaves_no_polling_behind(studio: Studio) -> None:
    asked: list[Any] = []
    studio.page.route("**/studio/miner", lambda route: asked.append(route))
    studio.page.click("#tab-miner")
    until(lambda: studio.page.title() and asked, "the figures are asked for")
    studio.page.click("#tab-make")
    asked[0].continue_()
    studio.page.wait_for_timeout(2500)  # longer than between two polls
    assert len(asked) == 1
