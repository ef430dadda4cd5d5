"""The door: generators that the project does not know go through API, engine, pipeline and self-check unchanged."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from generation.engine.engine import Engine
from generation.generators.base import Checkpoint, Generator, Parts
from generation.generators.kinds import KINDS, load_models, load_options
from generation.pipeline import assemble, warm_up
from generation.pipeline.pipeline import Asset, Job, Pipeline, Request
from generation.schema.options import ModelChoice, SettingsError
from generation.settings import Settings
from generation.splats import ply
from generation.splats.gaussians import SH_C0
from generation.stages.self_check import Check, views
from generation.weights import lookup
from tests.support import standin_generators
from tests.support.service_harness import PATIENCE_S, serving_engine, wait_until
from tests.support.standin_generators import Ball, Sculpture
from tests.support.standins import Painter, WhiteIsBackground, colour_check

BALL, SCULPTURE = "generator: ball", "generator: sculpture"
RED, BLUE = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more entries in the one table; and a hundredth of the validators' pixels."""
    for name, kind in standin_generators.KINDS.items():
        monkeypatch.setitem(KINDS, name, kind)
    monkeypatch.setattr(views, "VIEW_SIZE", 48)


@pytest.fixture
def resolve(tmp_path: Path, mini_models: Path) -> Callable[..., Settings]:
    """Settings of two configs."""

    def resolved(text: str, image: str | None = None, **more: Any) -> Settings:
        values: dict[str, Any] = {"profile": "tiny", "models": mini_models}
        for key, content in {"config": text, "image_config": image}.items():
            if content is not None:
                values[key] = tmp_path / f"{key}.yaml"
                values[key].write_text(content)
        return Settings.resolve(values | more)

    return resolved


def made(settings: Settings, most: int = 4) -> tuple[Pipeline, Any, Any]:
    """The real pipeline around the generators of ``settings``, and these, for texts and for pictures."""
    matting: Any = WhiteIsBackground()
    text, image = assemble.load_generators(settings, Parts({}, matting.remove, "cpu"))
    turns = settings.models.offload_generators
    painter: Any = Painter() if settings.options.draws else None
    return Pipeline(painter, matting, text, image, colour_check(), "cpu", [], most, turns), text, image


def blue_square() -> Image.Image:
    picture = Image.new("RGB", (90, 60), "white")
    picture.paste((0, 0, 255), (20, 10, 70, 50))
    return picture


def ask(prompt: str, seed: int = 1) -> Request:
    return Request(prompt=prompt, seed=seed, threshold=0.6)


def show(seed: int = 1) -> Request:
    return Request(image=blue_square(), seed=seed, threshold=0.6)


def colour(data: bytes) -> torch.Tensor:
    return (0.5 + SH_C0 * ply.read(data).sh[:, 0]).mean(0)


def finish(pipeline: Pipeline, jobs: list[Job]) -> list[Any]:
    while unfinished := [job for job in jobs if job.outcome is None]:
        pipeline.tick(unfinished)
    return [job.outcome for job in jobs]


@contextmanager
def served(settings: Settings, most: int = 4) -> Iterator[tuple[httpx.Client, Any, Any]]:
    pipeline, text, image = made(settings, most)
    engine = Engine(lambda progress: pipeline, 16, most)
    with serving_engine(engine, 16, settings) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        wait_until(lambda: engine.status == "ready")
        yield client, text, image


def post(client: httpx.Client, prompt: str | None = None, seed: int = 1, request_id: str = "") -> httpx.Response:
    data = {"seed": str(seed)} | ({"prompt": prompt} if prompt else {})
    files = None
    if prompt is None:
        png = io.BytesIO()
        blue_square().save(png, "PNG")
        files = {"prompt_image_file": ("blue.png", png.getvalue(), "image/png")}
    headers = {"X-Request-Id": request_id} if request_id else {}
    return client.post("/generate/", data=data, files=files, headers=headers)


class TestService:
    def test_texts_and_pictures_go_to_their_generators(self, resolve: Callable[..., Settings]) -> None:
        with served(resolve(BALL, SCULPTURE)) as (client, text, image):
            image.held.clear()
            with ThreadPoolExecutor(2) as pool:
                of_picture = pool.submit(post, client, None)
                wait_until(lambda: ("tick", "") in image.log)
                of_text = pool.submit(post, client, "a red ball").result()
                assert not of_picture.done()  # they ran together
                image.held.set()
            picture = of_picture.result()
            assert (of_text.status_code, picture.status_code) == (200, 200)
            assert list(seconds(of_text)) == [
                "text_to_image", "background", "ball", "self_check",
            ]  # fmt: skip
            assert list(seconds(picture)) == ["text_to_image", "background", "sculpture", "self_check"]
            assert torch.allclose(colour(of_text.content), RED, atol=0.05)
            assert torch.allclose(colour(picture.content), BLUE, atol=0.05)
            assert text.log == [("encode", "a red ball"), ("begin", "a red ball"), ("tick", "a red ball")]
            assert image.log[:3] == [("prefetch", ""), ("begin", "", True), ("tick", "")]
            assert image.log.count(("tick", "")) == 40
            generators = client.get("/health").json()["generators"]
            assert generators == {
                "text": {"name": "ball", "config": "config.yaml"},
                "image": {"name": "sculpture", "config": "image_config.yaml"},
            }
            assert 'stage="sculpture"' in client.get("/metrics").text

    def test_progress_is_a_fraction_of_the_generators_own_stage(self, resolve: Callable[..., Settings]) -> None:
        with served(resolve(SCULPTURE + "\nticks: 4")) as (client, *_):
            told: list[str] = []
            listening = threading.Event()

            def follow() -> None:
                with client.stream("GET", "/events/mine") as stream:
                    for line in stream.iter_lines():
                        listening.set()
                        told.append(line)

            follower = threading.Thread(target=follow)
            follower.start()
            listening.wait(PATIENCE_S)
            assert post(client, "a red ball", request_id="mine").status_code == 200
            follower.join(PATIENCE_S)
            fractions = [line for line in told if '"stage": "sculpture"' in line]
            assert [float(line.split('"fraction": ')[1].split(",")[0]) for line in fractions] == [
                0.0, 0.0, 0.25, 0.5, 0.75, 1.0,
            ]  # fmt: skip

    def test_words_alone_need_no_picture(self, resolve: Callable[..., Settings]) -> None:
        settings = resolve(f"{BALL}\nfrom_words: true", SCULPTURE)
        assert "text_to_image" not in settings.models.needed(settings.options, settings.image_options)
        with served(settings) as (client, *_):
            answer = post(client, "a blue ball")
            assert list(seconds(answer)) == ["ball", "self_check"]
            assert torch.allclose(colour(answer.content), BLUE, atol=0.05)
            assert "sculpture" in seconds(post(client))

    def test_given_up_in_the_middle(self, resolve: Callable[..., Settings]) -> None:
        with served(resolve(SCULPTURE)) as (client, text, _):
            text.held.clear()
            with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=client.base_url) as impatient:
                kept = pool.submit(post, client, "a red ball", 3)
                wait_until(lambda: ("tick", "a red ball") in text.log)
                with pytest.raises(httpx.ReadTimeout):
                    impatient.post("/generate/", data={"prompt": "a blue ball"}, timeout=0.3)
                wait_until(lambda: client.get("/health").json()["totals"]["cancelled"] == 1)
                text.held.set()
                assert kept.result().content
            together = sum(each == ("tick", "a red ball", "a blue ball") for each in text.log)
            assert 0 < together < 40
            assert sum("a red ball" in each for each in text.log if each[0] == "tick") == 40
            assert post(client, "a red ball", 3).content == kept.result().content

    @pytest.mark.slow
    def test_half_a_million_gaussians(self, resolve: Callable[..., Settings]) -> None:
        with served(resolve(f"{SCULPTURE}\ngaussians: 500000")) as (client, *_):
            answer = post(client, "a red ball")
            assert (answer.status_code, answer.headers["X-Num-Gaussians"]) == (200, "500000")
            assert len(ply.read(answer.content)) == 500_000


def seconds(answer: httpx.Response) -> dict[str, float]:
    result: dict[str, float] = json.loads(answer.headers["X-Seconds"])
    return result


class TestPipeline:
    def test_full_memory_makes_works_begin_again_fewer_at_once(self, resolve: Callable[..., Settings]) -> None:
        pipeline, text, _ = made(resolve(SCULPTURE))
        alone = finish(pipeline, [pipeline.begin(ask("red", 1))])[0].ply
        text.log.clear()
        jobs = [pipeline.begin(ask("red", seed)) for seed in (1, 2, 3)]
        outcomes = finish(pipeline, jobs)
        assert all(outcome.ply for outcome in outcomes)
        assert outcomes[0].ply == alone
        assert pipeline.limit.current == 1
        begun = [each for each in text.log if each[0] == "begin"]
        assert begun == [("begin", "red", True)] * 3 + [("begin", "red", False)] * 3  # a prefetched value is used once

    def test_a_text_is_drawn_by_the_template_of_its_own_generator(self, resolve: Callable[..., Settings]) -> None:
        templates = ("{prompt} seen from the left", "{prompt} seen from the right")
        configs = [f"{BALL}\nprompt_template: '{template}'" for template in templates]
        pipeline, *_ = made(resolve(*configs))
        drawn: list[str] = []
        paint = pipeline.text_to_image.generate  # type: ignore[union-attr]
        pipeline.text_to_image.generate = lambda texts, seeds: drawn.extend(texts) or paint(texts, seeds)  # type: ignore
        finish(pipeline, [pipeline.begin(ask("a red ball")), pipeline.begin(show())])
        assert drawn == ["a red ball seen from the left"]

    def test_what_can_be_prefetched_is_while_the_picture_is_drawn(self, resolve: Callable[..., Settings]) -> None:
        pipeline, text, _ = made(resolve(SCULPTURE))
        painting, cutting = pipeline.text_to_image.generate, pipeline.background.remove  # type: ignore[union-attr]
        pipeline.text_to_image.generate = lambda *more: text.log.append(("draw",)) or painting(*more)  # type: ignore
        pipeline.background.remove = lambda images: text.log.append(("cut out",)) or cutting(images)  # type: ignore
        finish(pipeline, [pipeline.begin(ask("red"))])
        order = [each[0] for each in text.log]
        assert order[:5] == ["draw", "encode", "prefetch", "cut out", "begin"]

    def test_what_comes_of_a_request_does_not_depend_on_the_other_kind(self, resolve: Callable[..., Settings]) -> None:
        pipeline, *_ = made(resolve(BALL, SCULPTURE))
        alone = [finish(pipeline, [pipeline.begin(each)])[0].ply for each in (ask("red", 4), show(5))]
        together = finish(pipeline, [pipeline.begin(show(5)), pipeline.begin(ask("red", 4))])
        assert [asset.ply for asset in reversed(together)] == alone

    def test_a_warm_up_makes_a_splat_of_a_text_and_of_a_picture(
        self, resolve: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline, text, image = made(resolve(BALL, SCULPTURE), most=1)
        pipeline.device = "cuda"  # what only a GPU needs runs anywhere
        monkeypatch.setattr(warm_up, "_warm_up_stages", lambda pipeline, progress: None)
        monkeypatch.setattr(pipeline, "_draw", lambda jobs: [torch.zeros(3, 64, 64)] * len(jobs))
        told: list[str] = []
        warm_up.warm_up(pipeline, told.append)
        assert told[:2] == ["warming up the ball", "warming up the sculpture"]
        assert text.log[-1][0] == image.log[-1][0] == "tick"


class TestTurns:
    """On a small card one generator at a time has its networks on the device."""

    @pytest.fixture
    def pair(self, resolve: Callable[..., Settings]) -> tuple[Pipeline, Ball, Sculpture]:
        settings = resolve(BALL, f"{SCULPTURE}\nticks: 5")
        models = settings.models.model_copy(update={"offload_generators": True})
        pipeline, text, image = made(settings.model_copy(update={"models": models}))
        pipeline._judge = lambda jobs: [Check({}, 1.0) for _ in jobs]  # type: ignore[method-assign]
        return pipeline, text, image

    def test_they_begin_offloaded_and_are_never_both_loaded(self, pair: tuple[Pipeline, Ball, Sculpture]) -> None:
        pipeline, text, image = pair
        assert not text.loaded
        assert not image.loaded
        jobs = [pipeline.begin(each) for each in (show(1), ask("red", 2), show(3), ask("blue", 4))]
        while unfinished := [job for job in jobs if job.outcome is None]:
            pipeline.tick(unfinished)
            assert not (text.loaded and image.loaded)
        assert all(isinstance(job.outcome, Asset) and job.outcome.ply for job in jobs)
        # One turn for each kind: the second picture goes along with the first, and so does the second text.
        assert (text.log.count(("onload",)), image.log.count(("onload",))) == (1, 1)

    def test_a_kind_that_goes_on_coming_does_not_keep_the_turn(self, pair: tuple[Pipeline, Ball, Sculpture]) -> None:
        pipeline, *_ = pair
        jobs = [pipeline.begin(show(0)), pipeline.begin(ask("red"))]
        text = jobs[1]
        for seed in range(1, 40):
            pipeline.tick([job for job in jobs if job.outcome is None])
            if text.outcome is not None:
                break
            jobs.append(pipeline.begin(show(seed)))  # there is always another picture
        assert text.outcome is not None
        assert len(jobs) < 15
        assert all(isinstance(outcome, Asset) and outcome.ply for outcome in finish(pipeline, jobs))

    def test_a_generator_that_can_not_be_woken_keeps_no_memory(
        self, pair: tuple[Pipeline, Ball, Sculpture], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline, text, image = pair

        def onload() -> None:
            image.loaded = True  # half of it
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as full:
            full.setattr(image, "onload", onload)
            (outcome,) = finish(pipeline, [pipeline.begin(show())])
            assert isinstance(outcome, torch.OutOfMemoryError)
        assert finish(pipeline, [pipeline.begin(ask("red"))])[0].ply
        assert not image.loaded
        assert finish(pipeline, [pipeline.begin(show())])[0].ply
        assert not text.loaded

    def test_the_wait_for_a_turn_is_not_in_the_report(
        self, pair: tuple[Pipeline, Ball, Sculpture], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: now)
        pipeline, *_ = pair
        jobs = [pipeline.begin(show(1)), pipeline.begin(ask("red"))]
        while unfinished := [job for job in jobs if job.outcome is None]:
            now += 100.0
            pipeline.tick(unfinished)
        assert jobs[1].report.total_seconds <= 200


class TestAssembly:
    def test_one_generator_for_both_where_the_options_are_the_same(self, resolve: Callable[..., Settings]) -> None:
        _, text, image = made(resolve(BALL))
        assert text is image
        _, text, image = made(resolve(BALL, f"{BALL}\ngaussians: 9000"))
        assert text is not image
        assert image.options.gaussians == 9000

    def test_a_checkpoint_is_loaded_once_for_all_who_build_the_same_of_it(
        self, resolve: Callable[..., Settings], tmp_path: Path
    ) -> None:
        (tmp_path / "card.json").write_text('{"name": "red clay", "licence": "MIT"}')
        choice = ModelChoice(model=str(tmp_path))
        told: list[str] = []
        parts = Parts(
            {"clay": Checkpoint(tmp_path, lookup(choice), choice, "cpu")}, lambda images: images, "cpu", told.append
        )
        settings = resolve(BALL, SCULPTURE)
        own = {"needs_clay": True}
        both = {key: getattr(settings, key).model_copy(update=own) for key in ("options", "image_options")}
        text, image = assemble.load_generators(settings.model_copy(update=both), parts)
        assert isinstance(text, Ball)
        assert isinstance(image, Sculpture)
        assert text.clay is image.clay
        assert text.clay is not None
        assert text.clay.name == "red clay"
        assert told == ["loading red clay for clay onto cpu"]
        assert parts.load("clay", str) is not text.clay  # built differently

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_a_checkpoint_is_loaded_in_the_dtype_of_the_models_file(self, tmp_path: Path, dtype: str) -> None:
        (tmp_path / "card.json").write_text('{"name": "red clay", "licence": "MIT"}')
        choice = ModelChoice(model=str(tmp_path), dtype=dtype)  # type: ignore[arg-type]
        checkpoint = Checkpoint(tmp_path, lookup(choice), choice, "cpu")
        assert checkpoint.dtype is getattr(torch, dtype)

    def test_what_a_generator_needs_must_be_in_the_models_file(self, resolve: Callable[..., Settings]) -> None:
        with pytest.raises(SettingsError, match="needs_clay is true, but the models file has no clay"):
            resolve(BALL, f"{SCULPTURE}\nneeds_clay: true")

    def test_pictures_do_not_go_to_what_takes_words_alone(self, resolve: Callable[..., Settings]) -> None:
        with pytest.raises(SettingsError, match=r"image_config.*makes splats from words alone"):
            resolve(BALL, f"{BALL}\nfrom_words: true")
        with pytest.raises(SettingsError, match=r"image_config.*makes splats from words alone"):
            resolve(f"{BALL}\nfrom_words: true")  # which would serve both

    def test_a_limit_that_a_kind_has_not_is_refused(self, resolve: Callable[..., Settings]) -> None:
        with pytest.raises(SettingsError, match=r"max_gaussians: 9000: the generator ball has no such limit"):
            resolve(BALL, max_gaussians=9000)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("generator: cube", "generator: 'cube': must be one of dreamgaussian, .*ball, sculpture"),
            ("generator: [ball]", r"generator: \['ball'\]: must be one of"),
            ("generator: ball\niters: 5", "iters: 5"),  # another kind's key
            ("generator: ball\ngaussians: 0", "gaussians: 0"),
            ("generator: ball\nprompt_template: red", "exactly once"),
        ],
    )
    def test_a_config_that_can_not_be_used_is_named(self, tmp_path: Path, text: str, words: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(SettingsError, match=words) as error:
            load_options(path)
        assert str(path) in str(error.value)

    def test_a_config_without_a_kind_is_dreamgaussians(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        for text in ("iters: 5", "generator:\niters: 5"):
            path.write_text(text)
            assert load_options(path).generator == "dreamgaussian"

    def test_a_checkpoint_of_no_generator_is_named(self, tmp_path: Path, mini_models: Path) -> None:
        path = tmp_path / "models.yaml"
        for more, fine in (("clay: {model: ./clay}", True), ("mvdreem: {model: ./x}", False), ("max_bach: 2", False)):
            path.write_text(f"{mini_models.read_text()}\n{more}\n")
            if fine:
                assert load_models(path).of_generators["clay"].model == str(tmp_path / "clay")
            else:
                with pytest.raises(SettingsError, match=more.split(":")[0]):
                    load_models(path)


def test_the_project_s_own_generator_fits_the_door() -> None:
    """For the type checker, and that nothing of the protocol is missing."""
    from generation.generators.dreamgaussian.optimiser import DreamGaussian
    from generation.generators.dreamgaussian.scene import Scene

    members = [name for name in Generator.__dict__ if not name.startswith("_") and name not in ("name", "cutout")]
    assert {"tick", "begin", "offload"} <= set(members)
    assert all(hasattr(DreamGaussian, name) for name in members)
    assert DreamGaussian.name == "dreamgaussian"
    assert all(hasattr(Scene, name) for name in ("fraction", "done", "gaussians"))
