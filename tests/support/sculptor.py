"""A generator whose works become balls of the cut-out's colour, for tests of the pipeline."""

from typing import Any

import torch

from generation.generators.base import CutoutFrame, NoSplat, Subject
from generation.pipeline.pipeline import Request
from tests.support.standins import COLOURS, ball

STAGES = ["text_to_image", "background", "clay", "self_check"]


class Scene:
    """Becomes a ball of the cut-out's colour in the given number of steps."""

    def __init__(self, cutout: torch.Tensor, prompt: str, seed: int, iters: int) -> None:
        self.cutout, self.prompt, self.seed, self.iters = cutout, prompt, seed, iters
        self.iteration = 0

    @property
    def fraction(self) -> float:
        return self.iteration / self.iters

    @property
    def done(self) -> bool:
        return self.iteration >= self.iters

    def gaussians(self):
        if "shapeless" in self.prompt:
            raise NoSplat("clay: it has no shape")
        middle = self.cutout[:3, 32, 32]
        colour = next(name for name, value in COLOURS.items() if torch.allclose(torch.tensor(value), middle, atol=0.1))
        return ball(colour, count=100 if "sparse" in self.prompt else 8000, seed=self.seed)


class Sculptor:
    """A generator. Some prompts make it fail, alone or with all that share a tick."""

    name = "clay"
    cutout = CutoutFrame(64, 0.2)

    def __init__(self, iters: int) -> None:
        self.iters = iters
        self.batches: list[int] = []
        self.read_together: list[list[str]] = []
        self.begun_before: list[bool] = []

    def picture_prompt(self, words: str) -> str:
        return words

    def encode(self, texts: list[str]) -> None:
        self.read_together.append(texts)
        if any("unreadable" in text for text in texts):
            raise ValueError("not words")

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        return {"mvdream": (2, 4)} if "epic" in words else {}

    def prefetch(self, words: str, seed: int) -> list[tuple[str, int]]:
        return [(words, seed)]

    def begin(self, subject: Subject) -> Scene:
        assert subject.cutout is not None
        assert subject.cutout.shape == (4, 64, 64)
        self.begun_before.append(subject.prefetched is not None)
        if subject.prefetched is not None:
            assert subject.prefetched.pop() == (subject.words, subject.seed)  # can be used once
        if "unstartable" in subject.words:
            raise RuntimeError("no clay")
        if "unreadable" in subject.words:
            raise ValueError("not words")
        return Scene(subject.cutout, subject.words, subject.seed, self.iters)

    def tick(self, scenes: list[Scene]) -> None:
        self.batches.append(len(scenes))
        for scene in scenes:
            scene.iteration += 1
            if "collapse" in scene.prompt and scene.iteration == 2:
                raise RuntimeError("it fell over")


def ask(prompt: str | None, seed: int = 1, **more) -> Request:
    return Request(**{"prompt": prompt, "seed": seed, "threshold": 0.6, **more})


def align(pipeline, monkeypatch, score: float) -> None:
    """Let every splat agree with its prompt to this degree."""
    monkeypatch.setattr(pipeline.self_check, "_align", lambda views, prompts: [score] * len(prompts))


def told(seen: list[Any], what: Any, result: Any) -> Any:
    """``result``, and ``what`` is seen."""
    seen.append(what)
    return result
