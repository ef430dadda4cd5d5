"""Train the pack's LGM (`python -m scripts.tiny_pack.train_lgm`): eight views to 32,768 Gaussians in one pass.

It learns from exact renders of procedural objects, wherever they are seen from. What it is shown of them are

- exact views, from the very cameras that it is told of;
- views that do not agree: from cameras a little off, each bent, blurred and tinted by itself;
- views that the pack's own chain draws of the same caption: text to image, matting, then the multi-view diffusion
  around that picture; or around an exact picture, with and without words; or from words alone.

So it learns what those have in common, and how an object looks that they show badly. No view is matted: what is of the
backdrop's colour the network tells by itself.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import make_grid, save_image

from generation.generators.lgm.network import LGM, Config, to_gaussians
from generation.generators.multiview import MVDreamViews
from generation.schema.options import Models
from generation.settings import CONFIGS
from generation.splats.cameras import Cameras
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from generation.stages.background import BackgroundRemover, NothingInImage, recentre
from generation.stages.text_to_image import TextToImage

from . import judge
from .captions import ObjectSpec, caption, evaluation_specs, sample_spec
from .data import BACKDROP, over_backdrop
from .render import FOVY, FRONT_ELEVATION, RADIUS, Objects, Renderer, build, composite, orbit
from .training import arguments, autocast, compiled, fit, write_card

#: an elevation and an azimuth each: where pictures are taken from first, then around; then another ring
VIEWS = tuple((FRONT_ELEVATION, 90.0 * i) for i in range(4)) + tuple((5.0, 45.0 + 90.0 * i) for i in range(4))
CONFIG = Config(
    down_channels=(32, 64, 96, 160),
    down_attention=(False, False, True, True),
    up_channels=(160, 96, 64, 32),
    up_attention=(True, True, False, False),
    attention_heads=4,
    norm_groups=8,
    input_size=64,
    views=VIEWS,
    background=BACKDROP,
    stray_opacity=0.05,
    position="ray",
)
SHRINK = CONFIG.radius / RADIUS  # the network's units in one of the renderer's
TARGETS, TARGET_SIZE = 8, 128  # views of an object that it is held against, in pixels
SHOWN = 4  # of them in one step
# Validators look at 518 pixels, where the rasteriser's blur of 0.3 pixels^2 hides no gaps that it hides at 128.
BLUR = 0.3 * (TARGET_SIZE / 518) ** 2
FINE = 4  # exact targets of the test have so many samples along a pixel's side, and on a GPU renders have, too
STEPS, GUIDANCE = 12, 3.0  # of the multi-view diffusion, as in the profile
# How the views of a drawn object come about: of those with the proportions that their captions mean, and of the others,
# which only a picture can show.
WAYS = ({"chain": 0.85, "words": 0.15}, {"picture and words": 0.5, "picture": 0.5})
ALIKE = 0.5  # least agreement of drawn outlines with the exact ones: below it something else was drawn
_CHUNK = 244  # objects rendered together


def view_matrices(camera_to_world: Tensor) -> Tensor:
    """World -> camera (..., 4, 4), OpenCV axes and the network's units, of the renderer's OpenGL poses."""
    pose = camera_to_world.clone()
    pose[..., :3, 1:3] *= -1
    pose[..., :3, 3] *= SHRINK
    rotation = pose[..., :3, :3].transpose(-1, -2)
    view = torch.zeros_like(pose)
    view[..., :3, :3] = rotation
    view[..., :3, 3:] = -rotation @ pose[..., :3, 3:]
    view[..., 3, 3] = 1
    return view


def intrinsics(size: int, device: str | torch.device) -> Tensor:
    focal = size / (2 * math.tan(math.radians(FOVY) / 2))
    return torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], device=device)


def nominal(count: int, device: str, g: torch.Generator | None = None) -> Tensor:
    """Poses (count, V, 4, 4) of the views, in the renderer's units; with a generator a little off, each by itself."""
    elevation, azimuth = (torch.tensor(column).expand(count, -1) for column in zip(*VIEWS, strict=True))
    radius = torch.full_like(azimuth, RADIUS)
    if g is not None:
        much = torch.rand(count, 1, generator=g)  # some objects' cameras are further off
        elevation = elevation + much * 6 * torch.randn(elevation.shape, generator=g).clamp(-2, 2)
        azimuth = azimuth + much * 8 * torch.randn(azimuth.shape, generator=g).clamp(-2, 2)
        radius = radius * (1 + much * 0.05 * torch.randn(azimuth.shape, generator=g).clamp(-2, 2))
    return orbit(elevation, azimuth, radius).to(device)


def anywhere(count: int, device: str, g: torch.Generator) -> Tensor:
    """Poses (count, TARGETS, 4, 4): all around, mostly from where validators look."""
    elevation = torch.rand(count, TARGETS, generator=g) * 45 - 10
    steep = torch.rand(count, TARGETS, generator=g) < 0.2
    elevation = torch.where(steep, torch.rand(count, TARGETS, generator=g) * 100 - 35, elevation)
    azimuth = torch.rand(count, TARGETS, generator=g) * 360
    radius = RADIUS * (0.9 + 0.35 * torch.rand(count, TARGETS, generator=g))
    return orbit(elevation, azimuth, radius).to(device)


class Pool:
    """N objects: what is shown of them and what it is held against, as bytes on the device."""

    def __init__(self, tensors: dict[str, Tensor], specs: list[ObjectSpec]) -> None:
        self.tensors, self.specs = tensors, specs

    def __len__(self) -> int:
        return len(self.specs)

    @classmethod
    def load(cls, path: Path, device: str) -> Pool:
        kept = torch.load(path, map_location=device, weights_only=False)
        return cls(kept["tensors"], kept["specs"])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"tensors": self.tensors, "specs": self.specs}, path)

    @classmethod
    def joined(cls, pools: list[Pool]) -> Pool:
        names = pools[0].tensors
        tensors = {name: torch.cat([pool.tensors[name] for pool in pools]) for name in names}
        return cls(tensors, [spec for pool in pools for spec in pool.specs])


def render_views(specs: list[ObjectSpec], device: str, seed: int, supersample: int = 2) -> Pool:
    """Exact renders: `exact` and `jittered` (N, V, 4, 64, 64), `targets` (N, T, 4, 128, 128) with `views` (N, T, 4, 4),
    and a picture `front` (N, 4, 128, 128). Every second object has the proportions that its caption means.
    """
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    renderer, size = Renderer(device), CONFIG.input_size
    n, v = len(specs), len(VIEWS)

    def empty(views: int, pixels: int) -> Tensor:
        return torch.empty(n, views, 4, pixels, pixels, dtype=torch.uint8, device=device)

    out = {"exact": empty(v, size), "jittered": empty(v, size), "targets": empty(TARGETS, TARGET_SIZE)}
    out["front"] = empty(1, TARGET_SIZE)
    poses = {
        "exact": nominal(n, device),
        "jittered": nominal(n, device, g),
        "targets": anywhere(n, device, g),
        "front": nominal(n, device)[:, :1],
    }
    chunk, began = min(_CHUNK, n), time.monotonic()
    for start in range(0, n, chunk):
        start = min(start, n - chunk)  # equal chunks: the compiled kernels keep one shape
        part = slice(start, start + chunk)
        each = [build([spec], rng, 0.0 if (start + i) % 2 else 0.04) for i, spec in enumerate(specs[part])]
        objects = Objects(*(torch.cat(values) for values in zip(*(vars(o).values() for o in each), strict=True)))
        objects = renderer.frame(objects.to(device))
        for name, target in out.items():
            pixels = target.shape[-1]
            together = 4 if pixels == size else 1  # as many rays in one call
            for view in range(0, target.shape[1], together):
                some = poses[name][part, view : view + together]
                many = objects[torch.arange(chunk, device=device).repeat_interleave(some.shape[1])]
                rgba = renderer.render(many, some.flatten(0, 1), pixels, supersample=supersample)
                target[part, view : view + together] = (
                    (rgba * 255).round().to(torch.uint8).view(chunk, -1, *rgba.shape[1:])
                )
    out["views"] = view_matrices(poses["targets"])
    print(f"rendered {n} objects in {time.monotonic() - began:.1f} s", flush=True)
    return Pool(out, specs)


class Chain:
    """The pack's own stages on one device, many objects at once: text to image, matting, multi-view diffusion."""

    def __init__(self, pack: Path, device: str) -> None:
        models = Models.load(CONFIGS / "models_tiny.yaml")
        self.device = device
        self.flux = TextToImage.load(pack / "flux", models.text_to_image, device)
        self.matting = BackgroundRemover.load(pack / "background", models.background, device)
        self.multiview_models = {
            known: MVDreamViews.load(
                pack / "mvdream", device, torch.float32, views=VIEWS, steps=STEPS, guidance_scale=GUIDANCE,
                known_view=known, backdrop=BACKDROP,
            )
            for known in (True, False)
        }  # fmt: skip

    def cut_out(self, pictures: Tensor) -> Tensor:
        """RGBA (N, 4, 64, 64) of pictures (N, 3, S, S); all transparent where there is nothing."""
        size = CONFIG.input_size
        cutouts = torch.zeros(len(pictures), 4, size, size, device=pictures.device)
        for i, (picture, alpha) in enumerate(zip(pictures, self.matting.remove(pictures), strict=True)):
            try:
                cutouts[i] = recentre(picture, alpha, size)
            except NothingInImage:
                continue
        return cutouts

    @torch.no_grad()
    def draw(self, texts: list[str], cutouts: Tensor | None, seeds: list[int]) -> Tensor:
        """Views (N, V, 3, 64, 64) in 0..1 of words ("" for none), around cut-outs (N, 4, 64, 64) if there are any."""
        multiview = self.multiview_models[cutouts is not None]
        samplings = multiview.begin(texts, list(cutouts) if cutouts is not None else [None] * len(texts), seeds)
        sampler = multiview._sampler
        for _ in range(STEPS):  # all in one call: the service's pieces of four would leave a GPU idle
            with torch.autocast(self.device, torch.float16, enabled=self.device == "cuda"):
                (latents,) = sampler._denoise(*sampler._inputs(samplings))
            for sampling, each in zip(samplings, latents, strict=True):
                sampling.latents, sampling.at = each, sampling.at + 1
        return multiview._images(torch.stack([multiview._final_latents(sampling) for sampling in samplings]))[0]

    def picture(self, texts: list[str], seeds: list[int]) -> Tensor:
        """Cut-outs (N, 4, 64, 64) of what text to image draws."""
        return self.cut_out(torch.stack(list(self.flux.generate(texts, seeds))))


def draw_views(pool: Pool, chain: Chain, seed: int, chunk: int = 96, until: float = math.inf) -> None:
    """Adds `drawn` (N, V, 3, 64, 64) to the pool, and `usable` (N,), whether they show the object at all.

    What is not drawn when the time is `until` (of `time.monotonic`) stays unusable.
    """
    rng = random.Random(seed)
    n, size, began = len(pool), CONFIG.input_size, time.monotonic()
    device = pool.tensors["exact"].device
    drawn = torch.zeros(n, len(VIEWS), 3, size, size, dtype=torch.uint8, device=device)
    usable = torch.zeros(n, dtype=torch.bool, device=device)
    meant = [WAYS[0] if i % 2 else WAYS[1] for i in range(n)]
    ways = [rng.choices(list(some), list(some.values()))[0] for some in meant]
    order = {way: [i for i in range(n) if ways[i] == way] for way in sorted(set(ways))}
    jobs = [(way, part[i : i + chunk]) for way, part in order.items() for i in range(0, len(part), chunk)]
    rng.shuffle(jobs)
    backdrop = torch.tensor(BACKDROP, device=device).view(3, 1, 1)
    shares: dict[str, list[float]] = {way: [] for way in order}
    for way, part in jobs:
        if time.monotonic() > until:
            print("no time left to draw", flush=True)
            break
        texts = [caption(pool.specs[i], rng, plain=rng.random() < 0.5) for i in part]
        if way == "chain":
            cutouts = chain.picture(texts, [rng.randrange(2**31) for _ in part])
        elif way != "words":
            fronts = composite(pool.tensors["front"][part, 0].float() / 255, 1.0)
            cutouts = chain.cut_out(fronts)
        told, seeds = [""] * len(part) if way == "picture" else texts, [rng.randrange(2**31) for _ in part]
        views = chain.draw(told, None if way == "words" else cutouts, seeds)
        drawn[part] = (views * 255).round().to(torch.uint8)
        outline = ((views - backdrop).abs().amax(2) > 0.35)[:, 1:]
        exact = pool.tensors["exact"][part, 1:, 3] > 127
        alike = (outline & exact).sum((2, 3)) / (outline | exact).sum((2, 3)).clamp_min(1)
        usable[part] = alike.mean(1) > ALIKE
        shares[way] += alike.mean(1).tolist()
    pool.tensors |= {"drawn": drawn, "usable": usable}
    agreed = {way: f"{sum(x) / len(x):.3f}" for way, x in shares.items() if x}
    print(f"drew {n} objects' views in {time.monotonic() - began:.1f} s; outlines alike {agreed}; usable "
          f"{float(usable.float().mean()):.3f}", flush=True)  # fmt: skip


def disagree(images: Tensor) -> Tensor:
    """Each view (N, 3, S, S) bent, blurred and tinted by itself: the backdrop stays as it is."""
    n, _, size, _ = images.shape
    device = images.device
    backdrop = torch.tensor(BACKDROP, device=device).view(3, 1, 1)
    much = torch.rand(n, 1, 1, 1, device=device)
    bend = F.interpolate(torch.randn(n, 2, 6, 6, device=device), size=(size, size), mode="bicubic") * 0.05 * much
    grid = F.affine_grid(torch.eye(2, 3, device=device).expand(n, -1, -1), [n, 1, size, size], align_corners=False)
    apart = images - backdrop  # zeros outside
    apart = F.grid_sample(apart, grid + bend.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(apart, 2), size=(size, size), mode="bilinear")
    blurred = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, F.avg_pool2d(blurred, 3, 1, 1), blurred)
    apart = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, blurred, apart)
    solid = (apart.abs().amax(1, keepdim=True) / 0.6).clamp(0, 1)
    images = apart + backdrop
    gain = 1 + 0.15 * torch.randn(n, 3, 1, 1, device=device).clamp(-2, 2) * torch.rand(n, 1, 1, 1, device=device)
    return (images + (images * gain - images) * solid).clamp(0, 1)


def shade(splats: Tensor, views: Tensor, size: int, background: Tensor, blur: float = 0.3) -> tuple[Tensor, Tensor]:
    """Colours (B, K, 3, S, S) and alphas (B, K, 1, S, S) of `splats` (B, N, 14) from `views` (B, K, 4, 4).

    `background` (B, K, 3); `blur` in pixels^2, as the rasteriser has it, on a GPU. Gradients that are not finite become
    zero: one Gaussian must not end a run.
    """
    if splats.requires_grad:
        splats.register_hook(lambda grad: torch.nan_to_num(grad, 0.0, 0.0, 0.0))
    Ks = intrinsics(size, splats.device)
    if splats.is_cuda:
        from gsplat import rasterization

        from generation.splats.rasterize import gsplat_build
        from generation.splats.rasterize.gsplat import TILE

        gsplat_build.load()
        means, opacity, scale, rotation, colour = (x.contiguous() for x in splats.split([3, 1, 3, 4, 3], -1))
        rgb, alpha, _ = rasterization(
            means, rotation, scale, opacity[..., 0], colour, views, Ks.repeat(*views.shape[:2], 1, 1), size, size,
            near_plane=0.2, eps2d=blur, packed=False, tile_size=TILE, backgrounds=background,
        )  # fmt: skip
        return rgb.permute(0, 1, 4, 2, 3), alpha.permute(0, 1, 4, 2, 3)
    results = []
    for each, poses, behind in zip(splats, views, background, strict=True):
        gaussians = _plain(each)
        rgb, alpha, _ = rasterize(gaussians, Cameras(poses, Ks.expand(len(poses), 3, 3)), size, size, behind)
        results.append((rgb.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)))
    return torch.stack([rgb for rgb, _ in results]), torch.stack([alpha for _, alpha in results])


def _plain(splats: Tensor) -> Gaussians:
    """All of them, with gradients."""
    position, opacity, scale, rotation, colour = splats.split([3, 1, 3, 4, 3], -1)
    return Gaussians(
        position.contiguous(), rotation.contiguous(), scale.clamp_min(1e-8).log(),
        opacity[:, 0].clamp(1e-6, 1 - 1e-6).logit(), ((colour - 0.5) / 0.28209479177387814)[:, None].contiguous(),
    )  # fmt: skip


def differences(images: Tensor, by: int) -> Tensor:
    return torch.cat([
        (images[..., by:] - images[..., :-by]).flatten(-2), (images[..., by:, :] - images[..., :-by, :]).flatten(-2)
    ], -1)  # fmt: skip


def begin_small(model: LGM) -> None:
    """Small, faint Gaussians near the middle of each ray."""
    bias = model.conv.bias
    assert bias is not None
    with torch.no_grad():
        model.conv.weight *= 0.5
        bias.zero_()
        bias[4] = -1.0
        bias[5:8] = -2.0
        bias[8] = 1.0


class Trainer:
    def __init__(self, model: LGM, pool: Pool, args, shares: tuple[float, float, float]) -> None:
        """`shares` of objects that are shown exactly, jittered, and as they are drawn."""
        self.model, self.pool, self.args = model, pool, args
        self.rays = model.rays().to(args.device)
        self.forward = compiled(model, args)
        self.batch = args.batch or 32
        self.shares = torch.tensor(shares, device=args.device)

    def loss(self) -> Tensor:
        args, t, b = self.args, self.pool.tensors, self.batch
        with torch.no_grad():
            i = torch.randint(len(self.pool), (b,), device=args.device)
            kind = torch.multinomial(self.shares, b, replacement=True).view(-1, 1, 1, 1, 1)
            exact = over_backdrop(t["exact"][i].float() / 255)
            jittered = over_backdrop(t["jittered"][i].float() / 255)
            jittered = disagree(jittered.flatten(0, 1)).view_as(jittered)
            usable = t["usable"][i].view(-1, 1, 1, 1, 1)
            drawn = torch.where(usable, t["drawn"][i].float() / 255, jittered)
            shown = torch.where(kind == 0, exact, torch.where(kind == 1, jittered, drawn))
            k = torch.rand(b, TARGETS, device=args.device).argsort(1)[:, :SHOWN]
            wanted = t["targets"][i[:, None], k].float() / 255
            views = t["views"][i[:, None], k]
            background = torch.rand(b, SHOWN, 3, device=args.device)
            behind = background[..., None, None]
            wanted_rgb, wanted_alpha = composite(wanted, behind), wanted[:, :, 3:]
        with autocast(args):
            splats = self.forward(shown, self.rays)
        rgb, alpha = shade(splats.float(), views, TARGET_SIZE, background, BLUR)
        off = torch.cat([rgb - wanted_rgb, alpha - wanted_alpha], 2)
        edges = sum(differences(off, by).abs().mean() for by in (1, 2))
        return (
            off[:, :, :3].square().mean()
            + off[:, :, 3:].square().mean()
            + 0.1 * off.abs().mean()
            + 0.1 * edges
            + 1e-3 * splats[..., 3].mean()
        )


@torch.no_grad()
def measure(model: LGM, pool: Pool, name: str, device: str) -> dict[str, float]:
    """From the pool's views called `name`: figures of renders on white against the exact targets."""
    rays, decibels, outlines = model.rays().to(device), [], []
    for i in range(0, len(pool), 16):
        t = {key: value[i : i + 16] for key, value in pool.tensors.items()}
        shown = t[name].float() / 255
        splats = model(over_backdrop(shown) if shown.shape[2] == 4 else shown, rays)
        white = torch.ones(*t["views"].shape[:2], 3, device=device)
        fine = FINE if splats.is_cuda else 1
        rgb, alpha = shade(splats, t["views"], TARGET_SIZE * fine, white)
        rgb, alpha = (F.avg_pool2d(x.flatten(0, 1), fine).unflatten(0, x.shape[:2]) for x in (rgb, alpha))
        wanted = t["targets"].float() / 255
        error = (rgb.clamp(0, 1) - composite(wanted, 1.0)).square().mean((1, 2, 3, 4))
        decibels.append(-10 * error.log10())
        outlines.append(((alpha > 0.5) == (wanted[:, :, 3:] > 0.5)).float().mean((1, 2, 3, 4)))
    psnr = torch.cat(decibels)
    return {
        "psnr": round(float(psnr.mean()), 2),
        "psnr_tenth_percentile": round(float(psnr.quantile(0.1)), 2),
        "outlines_right": round(float(torch.cat(outlines).mean()), 4),
    }


def held_out_specs(count: int, seed: int) -> list[ObjectSpec]:
    """Objects of shape and colour pairs that no training has seen."""
    rng = random.Random(seed)
    found: list[ObjectSpec] = []
    while len(found) < count:
        spec = sample_spec(rng, 0.0, held_out=True)
        if spec.held_out:
            found.append(spec)
    return found


@torch.no_grad()
def unseen_prompts(model: LGM, chain: Chain, device: str, count: int, seed: int) -> tuple[dict[str, object], Tensor]:
    """The judge's opinion of splats made of unseen prompts by the whole chain; rows of views and renders."""
    from scripts.tools.contact_sheet import all_round

    judging = judge.load().to(device)
    rng = random.Random(seed)
    specs = evaluation_specs(count)
    texts = [caption(spec, rng, plain=True) for spec in specs]
    cutouts = chain.picture(texts, list(range(count)))
    views = chain.draw(texts, cutouts, list(range(count)))
    splats = torch.cat([model(part, model.rays().to(device)) for part in views.split(16)])
    right, rows, kept = [], [], []
    for spec, shown, each in zip(specs, views, splats, strict=True):
        gaussians = to_gaussians(each, CONFIG)
        kept.append(len(gaussians))
        drawn = all_round(gaussians)
        named = judging.name(F.interpolate(drawn, size=judge.SIZE, mode="area"))
        right.append((named[0] == spec.shape, named[1] == spec.colour))
        rows.append(
            torch.cat([F.interpolate(shown, size=96, mode="nearest"), F.interpolate(drawn, size=96, mode="area")])
        )
    figures = {
        "prompts": count,
        "shape_right": sum(a for a, _ in right) / count,
        "colour_right": sum(b for _, b in right) / count,
        "both_right": sum(a and b for a, b in right) / count,
        "gaussians": sum(kept) / count,
        "wrong": [f"{text} ({'shape' if not a else ''}{'colour' if not b else ''})"
                  for text, (a, b) in zip(texts, right, strict=True) if not (a and b)],
    }  # fmt: skip
    return figures, torch.cat(rows)


def save(model: LGM, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG), indent=2) + "\n")


def main() -> None:
    args = arguments(
        __doc__,
        minutes=13,
        more={
            "--shares": {
                "type": float,
                "nargs": 3,
                "default": (0.2, 0.2, 0.6),
                "metavar": ("EXACT", "JITTERED", "DRAWN"),
                "help": "of objects that are shown exactly, jittered, and as they are drawn",
            },
            "--lr": {"type": float, "help": "learning rate at the start (default: 1e-3, with --tune 4e-4)"},
            "--pause": {"type": float, "help": "seconds after the start at which to keep what there is and stop"},
            "--finish": {"action": "store_true", "help": "this run is the last: the learning rate ends with its time"},
            "--prompts": {"type": int, "default": 48, "help": "unseen prompts to be judged at the end"},
            "--sheet": {"type": Path, "help": "where a contact sheet goes"},
        },
    )
    began, count = time.monotonic(), 4096 if args.objects is None else args.objects
    model = LGM(CONFIG)
    if args.tune:
        model.load_state_dict(load_file(args.pack / "lgm" / "model.safetensors"))
    else:
        begin_small(model)
    model.to(args.device)
    chain = Chain(args.pack, args.device)
    # Each run draws objects of its own, and sees those of the runs before, too.
    earlier = sorted(args.work.glob("pool_lgm_*.pt"))
    pools = [Pool.load(path, args.device) for path in earlier]
    if count:
        seed = args.seed + 100 + len(earlier)
        rng = random.Random(seed)
        fresh = render_views([sample_spec(rng) for _ in range(count)], args.device, seed)
        draw_views(fresh, chain, seed, until=began + 0.4 * args.pause if args.pause else math.inf)
        del fresh.tensors["front"]
        fresh.save(args.work / f"pool_lgm_{len(earlier)}.pt")
        pools.append(fresh)
    pool = Pool.joined(pools)
    args.objects = len(pool)  # for the card: those of the runs before, too
    trainer = Trainer(model, pool, args, args.shares)
    until = began + args.pause if args.pause else None
    if args.finish and until:
        kept = args.work / "lgm.pt"
        spent = torch.load(kept, weights_only=True)["spent"] if kept.exists() else 0.0
        args.minutes = (spent + until - time.monotonic()) / 60
    lr = args.lr or (4e-4 if args.tune else 1e-3)
    best, run = fit("lgm", model, trainer.loss, args, lr=lr, decay=0.998, until=until)
    folder = args.pack / "lgm"
    save(best, folder)
    del trainer, pool, pools
    test = render_views(held_out_specs(max(args.prompts, 4) * 2, 1), args.device, 1, supersample=FINE)
    draw_views(test, chain, 1)
    names = ("exact", "jittered", "drawn")
    quality: dict[str, object] = {f"from_{name}_views": measure(best, test, name, args.device) for name in names}
    quality["unseen_prompts"], rows = unseen_prompts(best, chain, args.device, args.prompts, 0)
    write_card(
        folder, "tiny-lgm", "scripts/tiny_pack/train_lgm.py", args, run, quality,
        lr=lr, shares=args.shares, background=BACKDROP,
    )  # fmt: skip
    if args.sheet:
        save_image(make_grid(rows, nrow=2 * len(VIEWS), pad_value=1.0), args.sheet)
    print(f"lgm: {run} {json.dumps(quality)}", flush=True)


if __name__ == "__main__":
    main()
