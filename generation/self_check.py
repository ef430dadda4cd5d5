"""Scores a splat the way the subnet's validators do, before it leaves the machine: hard gates, then CLIP.

What the validators' final score has beyond this (learned image quality, LPIPS) needs weights that do not come with this
repository; it is left out, not estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from generation.results import GateResult
from generation.settings import MIN_GAUSSIANS, ModelChoice
from generation.splats import cameras
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from generation.text_cache import TextCache, cut
from generation.transfer import send
from generation.weights.registry import ClipUse, WeightsError

# The validators' rules.
MIN_OPACITY = 0.001
MAX_TRANSPARENT_SHARE = 0.8
# The validators' views.
VIEWS = 16
VIEW_SIZE = 224  # pixels
ELEVATION, RADIUS, FOVY = 15.0, 2.5, 49.1  # degrees, world units, degrees
BOX_SIDE = 1.5  # world units
# Their outlier rule: distance to the 5th nearest of the other views' scores, the largest tenth goes.
NEIGHBOURS, CONTAMINATION = 5, 0.1
#: A score below this counts as 0 to a validator.
MIN_ALIGNMENT = 0.3

# Ours. The .spz that carries a splat holds coordinates up to 2**11 in steps of 2**-12, so a box outside of these limits
# would not arrive; its rotations are in steps of 1/127.5, so anything closer than that to identity arrives as identity.
MIN_BOX_SIDE, MAX_COORDINATE = 0.05, 2047.0
MIN_ROTATION = 0.005

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Check:
    """Outcome of a self-check. Without a score, a gate was not passed and nothing was rendered."""

    gates: dict[str, GateResult]
    score: float | None = None  # 0..1
    cosines: list[float] = field(default_factory=list)  # of each view with the prompt, outliers included
    views: Tensor | None = None  # (16, 3, 224, 224), what the validators see

    @property
    def failed_gate(self) -> str | None:
        """Why the first gate that was not passed was not."""
        return next((gate.reason for gate in self.gates.values() if not gate.passed), None)


class SelfCheck:
    """A loaded CLIP model and the validators' way of asking it."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        use: ClipUse,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        own = open_clip.get_model_preprocess_cfg(model)
        size = own["size"] if isinstance(own["size"], int) else own["size"][0]
        self._model, self._tokenizer = model, tokenizer
        self._use, self._device, self._dtype = use, device, dtype
        self._texts = TextCache(self._encode)
        self._size = use.image_size or size
        self._mean = torch.tensor(use.mean or own["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(use.std or own["std"], device=device).view(1, 3, 1, 1)

    @classmethod
    def load(cls, folder: Path, choice: ModelChoice, use: ClipUse | None, device: str) -> SelfCheck:
        """Load an open_clip folder (``open_clip_config.json``, a checkpoint, tokenizer files). Raises WeightsError."""
        if use is None:
            raise WeightsError(f"{folder}: a CLIP model's card must say its cosine_scale")
        name = f"local-dir:{folder}"
        try:
            model = open_clip.create_model_from_pretrained(
                name, precision=_PRECISIONS[choice.dtype], device=device, return_transform=False
            )
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"{folder}: not a usable open_clip model: {error}") from error
        model.requires_grad_(False)
        return cls(model.eval(), tokenizer, use, device, getattr(torch, choice.dtype))

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> None:
        """Texts that splats will be compared with."""
        self._texts.read(prompts)

    def cut(self, prompt: str) -> dict[str, tuple[int, int]]:
        """Where only the beginning of it is read: tokens that are, and of how many."""
        tokens = cut(self._tokenizer, prompt)
        return {"self_check": tokens} if tokens else {}

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Look at the views of so many splats, without scoring them."""
        self._embed_images(torch.rand(count * VIEWS, 3, VIEW_SIZE, VIEW_SIZE))

    def check(self, gaussians: Gaussians, prompt: str | Image.Image) -> Check:
        """See ``check_all``, of one."""
        return self.check_all([(gaussians, prompt)])[0]

    @torch.no_grad()
    def check_all(self, splats: Sequence[tuple[Gaussians, str | Image.Image]]) -> list[Check]:
        """Gates first; splats that pass them are put into the validators' frame, rendered and scored by their prompts.

        All views are embedded together.
        """
        checks = [Check(run_gates(gaussians)) for gaussians, _ in splats]
        passed = [i for i, check in enumerate(checks) if check.failed_gate is None]
        images = [render_views(fit_to_frame(splats[i][0]).to(self._device)) for i in passed]
        if images:
            embedded = self._embed_images(torch.cat(images)).split(VIEWS)
            targets = self._embed_prompts([splats[i][1] for i in passed])
            for i, views, each, target in zip(passed, images, embedded, targets, strict=True):
                checks[i] = Check(checks[i].gates, *self._score(each, splats[i][1], target), views)
        return checks

    @torch.no_grad()
    def score_images(self, images: Tensor, prompt: str | Image.Image) -> tuple[float, list[float]]:
        """Score in 0..1 and the cosine of each of ``images`` (V, 3, H, W; 0..1) with the prompt.

        As the validators do it: outliers dropped, negative cosines count as 0, geometric mean, divided by the model's
        ``cosine_scale``. For an image prompt the cosines are between embeddings of images, and the scale is the model's
        ``image_cosine_scale``, 1 unless its card says otherwise, which is how validators score image tasks.
        """
        return self._score(self._embed_images(images), prompt, self._embed_prompts([prompt])[0])

    def _score(self, views: Tensor, prompt: str | Image.Image, target: Tensor) -> tuple[float, list[float]]:
        """Of embedded views (V, D) and of the prompt, embedded in `target` (D,)."""
        scale = self._use.cosine_scale if isinstance(prompt, str) else self._use.image_cosine_scale
        cosines = F.cosine_similarity(views.float(), target[None].float(), dim=1).cpu()
        kept = drop_outliers(cosines).clamp(0, 1)
        score = float(kept.log().mean().exp()) / scale  # log(0) is -inf: one kept view without likeness gives 0
        return min(1.0, max(0.0, score)), cosines.tolist()

    def _embed_prompts(self, prompts: Sequence[str | Image.Image]) -> list[Tensor]:
        """(D,) of each."""
        words = iter(self._texts.read([prompt for prompt in prompts if isinstance(prompt, str)]))
        return [next(words) if isinstance(p, str) else self._embed_images(to_tensor(p)[None])[0] for p in prompts]

    def _encode(self, texts: list[str]) -> list[Tensor]:
        words = self._model.encode_text(send(self._tokenizer(texts), self._device))  # type: ignore[operator]
        return [each.clone() for each in words]

    def _embed_images(self, images: Tensor) -> Tensor:
        images = images.to(self._device, torch.float32)
        if images.shape[-2:] != (self._size, self._size):
            images = F.interpolate(images, size=(self._size, self._size), mode="bicubic", align_corners=False)
        images = (images - self._mean) / self._std
        return self._model.encode_image(images.to(self._dtype))  # type: ignore[operator]


def run_gates(gaussians: Gaussians) -> dict[str, GateResult]:
    """The validators' hard rules, and what a splat needs to arrive at all, by name and in the order to report them."""
    count = len(gaussians)
    values = list(gaussians.tensors().values())
    finite = sum(int(value.isfinite().sum()) for value in values) / max(1, sum(value.numel() for value in values))
    transparent = int((gaussians.logit_opacities.sigmoid() < MIN_OPACITY).sum()) / count if count else 1.0
    rotation = float(F.normalize(gaussians.quats, dim=1)[:, 1:].abs().max()) if count else 0.0
    side = float((gaussians.means.amax(0) - gaussians.means.amin(0)).max()) if count else 0.0
    farthest = float(gaussians.means.abs().max()) if count else 0.0

    def gate(passed: bool, value: float, limit: float, words: str) -> GateResult:
        return GateResult(passed, value, limit, "" if passed else words)

    return {
        "finite": gate(
            finite == 1 or not count, finite, 1.0,
            f"finite: {1 - finite:.3g} of the values are not finite, none may be",
        ),
        "min_gaussians": gate(
            count >= MIN_GAUSSIANS, count, MIN_GAUSSIANS,
            f"min_gaussians: {count} Gaussians are under the limit of {MIN_GAUSSIANS}",
        ),
        "opacity": gate(
            transparent <= MAX_TRANSPARENT_SHARE, transparent, MAX_TRANSPARENT_SHARE,
            f"opacity: {transparent:.1%} of the Gaussians are invisible, over the limit of {MAX_TRANSPARENT_SHARE:.0%}",
        ),
        "rotations": gate(
            rotation >= MIN_ROTATION, rotation, MIN_ROTATION,
            f"rotations: all are within {rotation:.4f} of identity, the limit is {MIN_ROTATION}",
        ),
        "box_side": gate(
            side >= MIN_BOX_SIDE, side, MIN_BOX_SIDE,
            f"box_side: the longest side of the bounding box is {side:.4g}, under the limit of {MIN_BOX_SIDE}",
        ),
        "max_coordinate": gate(
            farthest <= MAX_COORDINATE, farthest, MAX_COORDINATE,
            f"max_coordinate: a coordinate reaches {farthest:.4g}, over the limit of {MAX_COORDINATE:g}",
        ),
    }  # fmt: skip


def fit_to_frame(gaussians: Gaussians) -> Gaussians:
    """The same splat, its points' mean at the origin and the longest side of their bounding box ``BOX_SIDE``.

    Validators bring every splat into this frame. Their code also divides opacities by the factor that it scales by, and
    subtracts one mean over all coordinates where it means one for each axis; for a splat that is delivered in this
    frame both do nothing, so what was scored here is what they see.
    """
    means = gaussians.means - gaussians.means.mean(0)
    scale = BOX_SIDE / float((means.amax(0) - means.amin(0)).max())
    return replace(gaussians, means=means * scale, log_scales=gaussians.log_scales + float(np.log(scale)))


@torch.no_grad()
def render_views(gaussians: Gaussians) -> Tensor:
    """The validators' views (16, 3, 224, 224) of a splat in their frame, in 0..1, on white, quantised to 8 bits.

    The first and the last azimuth are both 0, as with the validators. Like them, only the constant colour is drawn.
    """
    gaussians = replace(gaussians, sh=gaussians.sh[:, :1])
    azimuths = torch.linspace(0, 360, VIEWS)
    orbit = cameras.orbit(ELEVATION, azimuths, RADIUS, FOVY, VIEW_SIZE, VIEW_SIZE)
    rgb, _, _ = rasterize(gaussians, orbit.to(gaussians.means.device), VIEW_SIZE, VIEW_SIZE, torch.ones(3))
    return (rgb.permute(0, 3, 1, 2).clamp(0, 1) * 255).floor() / 255


def drop_outliers(values: Tensor) -> Tensor:
    """Values (V,) without the tenth that lies farthest from its 5th nearest neighbour (kNN detection, as in PyOD)."""
    if len(values) <= NEIGHBOURS:
        return values
    distance = (values[:, None] - values[None, :]).abs().sort(dim=1).values[:, NEIGHBOURS]  # [:, 0] is itself
    return values[distance <= torch.quantile(distance, 1 - CONTAMINATION)]


def neighbour_ssim(images: Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of each view with the next one, outliers dropped, geometric mean.

    Gaussian window of 11 pixels, deviation 1.5; ``images`` (V, 3, H, W) in 0..1. Negative similarities count as 0.
    """
    x, y = images, images.roll(-1, dims=0)
    offsets = torch.arange(11, device=images.device) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None, None].expand(3, 1, 1, 11)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window, groups=3), window.transpose(2, 3), groups=3)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(drop_outliers(ssim.mean(dim=(1, 2, 3))).clamp_min(0).log().mean().exp())


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) float32 in 0..1; what is transparent in it becomes white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
