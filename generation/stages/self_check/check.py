"""The whole self-check, for one splat or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from generation.schema.options import Models
from generation.schema.results import GateResult
from generation.schema.score import SHARES, final_score
from generation.splats.gaussians import Gaussians
from generation.stages.self_check.alignment import ImageClip, TextClip, with_picture, with_text
from generation.stages.self_check.gates import run_gates
from generation.stages.self_check.quality import Quality, QualityNet
from generation.stages.self_check.similarity import Lpips, ssim_term
from generation.stages.self_check.views import (
    VIEW_SIZE,
    VIEWS,
    fit_to_frame,
    render_views,
    to_tensor,
    to_validators_frame,
)
from generation.weights import Entry
from generation.weights.loading import only_file
from generation.weights.strict import naming


@dataclass(frozen=True)
class Check:
    """Outcome of a self-check. Without a score, a gate was not passed and nothing was rendered."""

    gates: dict[str, GateResult]
    score: float | None = None  # the final one, not limited to 1
    parts: dict[str, float | None] = field(default_factory=dict)  # alignment, iqa, ssim, lpips; None: no weights
    views: Tensor | None = None  # (16, 3, 518, 518), what the validators see
    least_alignment: float = 0.0  # with less the score is 0

    @property
    def failed_gate(self) -> str | None:
        """The reason of the first failed gate; None if all passed."""
        return next((gate.reason for gate in self.gates.values() if not gate.passed), None)

    @property
    def is_misaligned(self) -> bool:
        """Whether the alignment makes the score 0."""
        alignment = self.parts.get("alignment")
        return alignment is not None and alignment < self.least_alignment


class SelfCheck:
    """The validators' models, loaded, and their scoring. All but the text model are optional."""

    def __init__(
        self,
        text: TextClip,
        image: ImageClip | None = None,
        quality: Quality | None = None,
        lpips: Lpips | None = None,
        device: str = "cpu",
    ) -> None:
        self._text, self._image, self._quality, self._lpips = text, image, quality, lpips
        self._device = device

    @classmethod
    def load(cls, folders: Mapping[str, Path], entries: Mapping[str, Entry], models: Models, device: str) -> SelfCheck:
        """Load ``clip`` and the optional models of ``models``. Raises WeightsError."""
        offload = models.offload_self_check
        with naming(entries["clip"]):
            text = TextClip.load(folders["clip"], models.clip, entries["clip"].clip, device, offload)
        image = quality = lpips = None
        if models.image_clip is not None:
            with naming(entries["image_clip"]):
                use = entries["image_clip"].clip
                image = ImageClip.load(folders["image_clip"], models.image_clip, use, device, offload)
        if models.quality is not None:
            with naming(entries["quality"]):
                quality = Quality(QualityNet.load(folders["quality"]), device)
        if models.lpips is not None:
            with naming(entries["lpips"]):
                lpips = Lpips.load(folders["lpips"] / only_file(entries["lpips"]), device)
        return cls(text, image, quality, lpips, device)

    @property
    def parts(self) -> list[str]:
        """The parts of the final score that are measured."""
        lacking = {"iqa": self._quality is None, "lpips": self._lpips is None}
        return [part for part in SHARES if not lacking.get(part)]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """Encode texts in one batch, before splats are scored by them."""
        self._text.encode(prompts)

    def truncation(self, prompt: str) -> dict[str, tuple[int, int]]:
        """{"self_check": (tokens that are read, tokens of the prompt)} if the prompt is truncated."""
        tokens = self._text.truncation(prompt)
        return {"self_check": tokens} if tokens else {}

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Score random views of ``count`` splats, with texts and with pictures."""
        views = torch.rand(count, VIEWS, 3, VIEW_SIZE, VIEW_SIZE, device=self._device)
        picture = Image.new("RGB", (64, 64))
        self._measure(list(views), ["warm up"] * count)
        self._measure(list(views), [picture] * count)

    def check(self, gaussians: Gaussians, prompt: str | Image.Image) -> Check:
        """See ``check_all``, of one."""
        return self.check_all([(gaussians, prompt)])[0]

    @torch.no_grad()
    def check_all(self, splats: Sequence[tuple[Gaussians, str | Image.Image]], fit: bool = False) -> list[Check]:
        """Gates first; splats that pass them are put into the validators' frame, rendered and scored by their prompts.

        ``fit``: they will be delivered in that frame (``fit_to_frame``). Each model looks at all views together. A
        picture is taken for what a validator's decoder made of it.
        """
        nothing = {part: 0.0 if part in self.parts else None for part in SHARES}
        checks = [Check(run_gates(gaussians), parts=nothing) for gaussians, _ in splats]
        passed = [i for i, check in enumerate(checks) if check.failed_gate is None]
        framed = (
            fit_to_frame(gaussians) if fit else gaussians
            for gaussians in (splats[i][0].to(self._device) for i in passed)
        )
        views = [render_views(to_validators_frame(gaussians)) for gaussians in framed]
        for i, check in zip(passed, self._measure(views, [splats[i][1] for i in passed]), strict=True):
            checks[i] = replace(check, gates=checks[i].gates)
        return checks

    def _measure(self, views: list[Tensor], prompts: list[str | Image.Image]) -> list[Check]:
        """Of each splat's views (16, 3, H, W), without gates."""
        if not views:
            return []
        qualities: Sequence[Tensor | None] = [None] * len(views)
        if self._quality is not None:
            qualities = self._quality.score(torch.cat(views)).split(VIEWS)
        checks: list[Check] = []
        alignments = self._align(views, prompts)
        for each, prompt, quality, alignment in zip(views, prompts, qualities, alignments, strict=True):
            parts = {
                "alignment": alignment,
                "iqa": None if quality is None else float(quality.mean()),
                "ssim": ssim_term(each),
                "lpips": None if self._lpips is None else self._lpips.term(each),
            }
            use = self._text.use if isinstance(prompt, str) or self._image is None else self._image.use
            floor = use.min_alignment if isinstance(prompt, str) else use.min_image_alignment
            checks.append(Check({}, final_score(parts, floor), parts, each, floor))
        return checks

    def _align(self, views: list[Tensor], prompts: list[str | Image.Image]) -> list[float]:
        """Alignment of each splat with its prompt."""
        alignments: dict[int, float] = {}
        written = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
        drawn = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, str)}
        if written:
            texts = self._text.encode(list(written.values()))
            embedded = self._text.embed(torch.cat([views[i] for i in written])).split(VIEWS)
            for i, text, seen in zip(written, texts, embedded, strict=True):
                alignments[i] = with_text(seen, text, self._text.use.cosine_scale)
        if drawn:
            model = self._image or self._text
            embedded = model.embed(torch.cat([views[i] for i in drawn])).split(VIEWS)
            for i, seen in zip(drawn, embedded, strict=True):
                picture = model.embed(to_tensor(drawn[i])[None])[0]
                alignments[i] = with_picture(seen, picture, model.use.image_cosine_scale)
        return [alignments[i] for i in range(len(prompts))]
