"""LGM as a generator: a multi-view diffusion model samples views, then LGM turns them into Gaussians in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.accelerate.cuda_graph import GraphedFunction, compiled_sizes, split_batch
from generation.accelerate.offload import Offloaded
from generation.generators.base import Checkpoint, CutoutFrame, Parts, RemoveBackground, Subject
from generation.generators.lgm.network import LGM, Config, to_gaussians
from generation.generators.lgm.options import LgmOptions
from generation.generators.multiview import ImageDream, MVDreamViews, ViewSampling
from generation.splats.gaussians import Gaussians
from generation.weights import WeightsError

BORDER = 0.2  # of the picture, as the authors recentre it
DRAWN = 0.95  # progress of a work when its views are sampled


def load(options: LgmOptions, parts: Parts) -> Lgm:
    """Build LGM with the models that the options need. Raises WeightsError."""
    network = parts.load("lgm", LGM.from_checkpoint)
    name = "imagedream" if options.views_from == "picture" else "mvdream"
    build = partial(_load_multiview, options=options, config=network.config, offload=parts.offload)
    multiview = parts.load(name, build)
    return Lgm(network, multiview, options, parts.device, parts.remove_background)


def _load_multiview(
    checkpoint: Checkpoint, options: LgmOptions, config: Config, offload: bool
) -> ImageDream | MVDreamViews:
    common: dict[str, Any] = {
        "front_azimuth": checkpoint.entry.front_azimuth,
        "steps": options.view_steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "views": config.views,
        "offload_encoders": offload,
    }
    if options.views_from == "picture":
        if config.background != (1.0, 1.0, 1.0):
            raise WeightsError(f"ImageDream draws on white, this LGM takes views on {config.background}")
        return ImageDream.load(checkpoint.folder, checkpoint.device, checkpoint.dtype, **common)
    return MVDreamViews.load(
        checkpoint.folder,
        checkpoint.device,
        checkpoint.dtype,
        known_view=options.views_from == "picture_and_words",
        backdrop=config.background,
        **common,
    )


class LgmWork:
    """A ``generation.generators.base.Work``: views, then Gaussians."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.sampling: ViewSampling | None = None
        self.result: Gaussians | None = None

    @property
    def fraction(self) -> float:
        if self.result is not None:
            return 1.0
        return DRAWN * self.sampling.fraction if self.sampling is not None else 0.0

    @property
    def done(self) -> bool:
        return self.result is not None

    def gaussians(self) -> Gaussians:
        assert self.result is not None
        return self.result


class Lgm:
    """A ``generation.generators.base.Generator``. A tick is a denoising step of all views, or LGM's pass over them."""

    name = "lgm"

    def __init__(
        self,
        network: LGM,
        multiview: ImageDream | MVDreamViews,
        options: LgmOptions,
        device: str | torch.device,
        remove_background: RemoveBackground,
    ) -> None:
        self._network = network
        self._multiview = multiview
        self._options = options
        self._device = torch.device(device)
        self._remove_background = remove_background
        self._rays = network.rays()
        self._pass = GraphedFunction(self._splats)
        self._offloaded = Offloaded(network, device)
        self.cutout = CutoutFrame(multiview.image_size, BORDER) if options.draws else None

    def picture_prompt(self, words: str) -> str:
        return self._options.picture_prompt(words)

    @torch.no_grad()
    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        if self._device.type != "cuda":
            return
        self._multiview.warm_up(most, progress)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._offloaded = Offloaded(self._network, self._device)  # pins the weights in their new memory layout
        size = self._multiview.image_size
        for count in compiled_sizes(most):
            progress(f"capturing LGM for {count} of {most} at once")
            self._pass.capture(torch.rand(count, len(self._network.config.views), 3, size, size, device=self._device))

    def offload(self) -> None:
        self._multiview.offload()
        self._pass.forget()
        self._offloaded.offload()

    def onload(self) -> None:
        self._multiview.onload()
        self._offloaded.onload()

    def encode(self, texts: Sequence[str]) -> None:
        self._multiview.encode([self._options.view_prompt(text) for text in texts])

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        tokens = self._multiview.truncation(self._options.view_prompt(words))
        return {"imagedream" if self._options.views_from == "picture" else "mvdream": tokens} if tokens else {}

    def prefetch(self, words: str, seed: int) -> None:
        return None

    def begin(self, subject: Subject) -> LgmWork:
        return LgmWork(subject)

    @torch.no_grad()
    def tick(self, works: Sequence[LgmWork]) -> None:
        drawn = [work for work in works if work.sampling is not None and work.sampling.done]
        fresh = [work for work in works if work.sampling is None]
        if fresh:
            subjects = [work.subject for work in fresh]
            samplings = self._multiview.begin(
                [self._options.view_prompt(subject.words) for subject in subjects],
                [subject.cutout for subject in subjects],
                [subject.seed for subject in subjects],
            )
            for work, sampling in zip(fresh, samplings, strict=True):
                work.sampling = sampling
        unfinished = [work.sampling for work in works if work.sampling is not None and not work.sampling.done]
        if unfinished:
            self._multiview.step(unfinished)
        if drawn:
            self._finish(drawn)

    def _finish(self, works: Sequence[LgmWork]) -> None:
        views = self._multiview.views([work.sampling for work in works if work.sampling is not None])
        if self._options.recentre_views:
            views = self._recentred(views)
        for some in split_batch(len(works)):
            (splats,) = self._pass(views[some])
            for work, each in zip(works[some], splats, strict=True):
                o = self._options
                work.result = to_gaussians(each, self._network.config, o.min_gaussians, o.max_gaussians)

    def _splats(self, views: Tensor) -> tuple[Tensor]:
        return (self._network(views, self._rays),)

    def _recentred(self, views: Tensor) -> Tensor:
        """Views (B, V, 3, S, S) cut out and put into the middle, each by itself, on the network's background."""
        images = views.flatten(0, 1)
        alphas = self._remove_background(images)
        behind = images.new_tensor(self._network.config.background).view(3, 1, 1)
        return recentred(images, alphas, behind, BORDER).view_as(views)


def recentred(images: Tensor, alphas: Tensor, behind: Tensor, border: float) -> Tensor:
    """Images (N, 3, S, S) with alphas (N, 1, S, S), over the colour `behind` (3, 1, 1), each moved and scaled until the
    longer side of what is opaque fills `1 - border` of it, in its middle. One of which nothing is opaque stays.

    The host does not wait for the device.
    """
    size = images.shape[-1]
    ticks = (torch.arange(size, device=images.device) + 0.5) / size * 2 - 1
    opaque = alphas[:, 0] > 0.5
    half = 1 / size
    ends = []
    for seen in (opaque.any(1), opaque.any(2)):  # columns, rows
        least = torch.where(seen, ticks, 2.0).amin(1) - half
        most = torch.where(seen, ticks, -2.0).amax(1) + half
        ends.append((least, most))
    extent = torch.maximum(ends[0][1] - ends[0][0], ends[1][1] - ends[1][0])
    found = extent > 0
    scale = torch.where(found, extent / (2 * (1 - border)), 1.0)
    middle = torch.stack([torch.where(found, (least + most) / 2, 0.0) for least, most in ends], -1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = middle
    cut = torch.cat([images * alphas, alphas], 1)
    moved = F.grid_sample(cut, F.affine_grid(theta, list(cut.shape), align_corners=False), align_corners=False)
    return moved[:, :3] + behind * (1 - moved[:, 3:])
