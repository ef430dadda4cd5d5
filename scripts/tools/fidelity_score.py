"""The public validators' scoring and ours on the same splats, weights and device: how far they are apart.

    .venv/bin/python -m scripts.tools.fidelity_score VALIDATION [--splats FOLDER] [--golden]

VALIDATION is the folder `validation` of a checkout of github.com/404-Repo/three-gen-subnet, whose code is imported from
there and nothing of it kept. Besides ours it needs pytod, meshio and loguru; Open3D, of which it uses a minimum and a
maximum, is stood in for, as is what only its web server needs.

On a CPU: its metrics with small random models, in float32; ``--golden`` writes tests/golden/score.json anew. On a CUDA
GPU: all of it at full size, on `FOLDER/*.ply` and on splats made here. Weights are random, but so that alignment,
quality and LPIPS lie where they do in the field: at plain random weights both sides say 0.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config

from generation.schema.options import ModelChoice
from generation.splats import ply
from generation.splats.gaussians import Gaussians
from generation.stages.self_check import QualityNet, SelfCheck, fit_to_frame, render_views, to_validators_frame
from generation.stages.self_check.quality import DINOV2_SMALL, WEIGHTS
from generation.weights.registry import REGISTRY
from scripts.tools.scored_scenes import GOLDEN, Models, measure, pictures, scenes, tokenizer

LIMIT = 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 1280,
}  # fmt: skip
LPIPS_GAIN = 3.0  # of LPIPS's last layers: with random features views are more alike than with trained ones
NAMES = {"iqa": "iqa", "alignment": "alignment", "ssim": "ssim", "lpips": "lpips"}


@contextmanager
def authors(folder: Path) -> Iterator[Callable[[str], Any]]:
    """Imports modules of the checkout."""

    def extent(points: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(get_extent=lambda: points.max(0) - points.min(0))

    open3d = SimpleNamespace(
        geometry=SimpleNamespace(
            PointCloud=SimpleNamespace, AxisAlignedBoundingBox=lambda: SimpleNamespace(create_from_points=extent)
        ),
        utility=SimpleNamespace(Vector3dVector=np.asarray),
    )
    b64 = SimpleNamespace(
        b64decode=lambda text, validate=False: base64.b64decode(text, validate=validate),
        b64encode_as_string=lambda data: base64.b64encode(data).decode(),
    )
    stand_ins: dict[str, Any] = {"open3d": open3d, "pyspz": MagicMock(), "pybase64": b64, "fastapi": MagicMock()}
    if not torch.cuda.is_available():
        stand_ins |= {"gsplat": MagicMock(), "gsplat.rendering": MagicMock()}
    before = set(sys.modules)
    with patch.dict(sys.modules, stand_ins), patch.object(sys, "path", [str(folder), *sys.path]):
        try:
            yield importlib.import_module
        finally:
            for name in set(sys.modules) - before:
                if name.partition(".")[0] in ("engine", "server"):
                    del sys.modules[name]


def one_number(value: Any) -> float:
    """float() of an array or a tensor of one element, the first of which numpy has stopped to take for a number."""
    return float(value.reshape(-1)[0])


def lines(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return ", ".join(f"{part} {theirs[part]:.4f} (ours {ours[part] - theirs[part]:+.1e})" for part in theirs)


# ---- on a CPU ----


class Float32Torch:
    """Their module's torch, without its half precision and its autocast."""

    float16 = torch.float32
    amp = SimpleNamespace(autocast=lambda *_: nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def small(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Their metrics on the scenes of scripts/tools/scored_scenes.py, with its models: by kind of prompt, then scene."""
    models = Models.draw()
    results: dict[str, dict[str, dict[str, float]]] = {"text": {}, "picture": {}}
    with authors(folder) as load, patch.object(Tensor, "cuda", lambda tensor: tensor):
        alignment, quality, similarity = (
            load(f"engine.metrics.{name}_scorer") for name in ("alignment", "quality", "similarity")
        )
        engine_module = load("engine.validation_engine")
        alignment.torch = Float32Torch()
        engine = engine_module.ValidationEngine()
        engine._text_vs_image_metric._model = models.clip()
        engine._text_vs_image_metric._tokenizer = tokenizer
        engine._image_vs_image_metric._model = SimpleNamespace(get_image_features=models.picture_features)
        judge = engine._image_quality_metric._quality_classifier_model
        net = load("engine.models.quality_model").DINOv2Net(models.quality.backbone, emb_dim=8)
        net.score_head = models.quality.score_head
        judge._model, judge._image_size = net.eval(), models.quality.backbone.config.image_size
        with patch.object(torchvision.models, "alexnet", lambda **_: models.alexnet()):
            engine._similarity_metric.load_models()
        similarity.float = one_number
        assert quality
        for name, views in scenes().items():
            images = list((views * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
            for kind in results:
                if kind == "text":
                    found = engine.validate_text_to_gs(name, images)
                else:
                    found = engine.validate_image_to_gs(torch.from_numpy(np.asarray(pictures()[name])), images)
                results[kind][name] = {**{part: getattr(found, part) for part in NAMES}, "score": found.score}
    return results


def compare_small(folder: Path, golden: bool) -> bool:
    theirs = small(folder)
    worst = 0.0
    for kind, found in theirs.items():
        for name, values in found.items():
            ours = measure(name, kind)
            worst = max(worst, *(abs(ours[part] - value) for part, value in values.items()))
            print(f"{kind}, {name}: {lines(values, ours)}")
    print(f"largest difference {worst:.1e}")
    if golden:
        GOLDEN.write_text(json.dumps(theirs, indent=1) + "\n")
    return worst <= 1e-4


# ---- on a GPU ----


def rough(seed: int, count: int = 30_000) -> Gaussians:
    """A splat that is different from all sides: blobs on a ball, of colours by octant, off the frame."""
    g = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(count, 3, generator=g), dim=1)
    means *= 1 + 0.3 * (means * torch.randn(3, generator=g) * 4).sin().prod(1, keepdim=True)
    cell = ((means * 3).floor() + 5).long()
    colours = torch.rand(11, 11, 11, 3, generator=g)[cell[:, 0], cell[:, 1], cell[:, 2]]
    return Gaussians(
        means * (0.3 + 0.4 * seed) + 0.2 * torch.randn(3, generator=g),
        torch.randn(count, 4, generator=g),
        (torch.rand(count, 3, generator=g) * 0.03 * (0.3 + 0.4 * seed) + 1e-3).log(),
        torch.randn(count, generator=g) * 2,
        ((colours - 0.5) / 0.28209479)[:, None] + 0.1 * torch.randn(count, 1, 3, generator=g),
    )


@torch.no_grad()
def spread(layer: nn.Linear, features: Tensor, share: float = 1.5) -> None:
    """Take so much of what all features have in common out of a layer's results that the rest counts, too."""
    features, mean = features.float(), features.float().mean(0)
    common = layer.weight.float() @ mean
    rest = ((features - mean) @ layer.weight.float().T).norm(dim=1).mean()
    kept = min(1.0, float(share * rest / common.norm()))
    change = (1 - kept) * torch.outer(common, mean) / mean.square().sum()
    layer.weight.copy_((layer.weight.float() - change).to(layer.weight.dtype))


@torch.no_grad()
def inputs(layer: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What a layer is given."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    call()
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def draw(folder: Path, views: Tensor, prompts: list[str]) -> None:
    """Weights for all models, in the layouts of the public files, below `folder`; `views` (V, 3, 518, 518)."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        clip = open_clip.create_model("convnext_large_d", device=DEVICE).eval()
        config = CLIPVisionConfig(**TOWER)
        tower = CLIPVisionModelWithProjection(config).eval()
        net = QualityNet(Dinov2Config(**DINOV2_SMALL)).eval()
        alexnet = torchvision.models.alexnet(weights=None).features
    for name, parameter in [*clip.named_parameters(), *tower.named_parameters()]:
        if name.endswith("gamma"):
            parameter.uniform_(0.2, 0.6)
        elif parameter.dim() > 1 and "embedding" not in name:  # so strong that pictures and texts make a difference
            parameter.normal_(std=float(np.prod(parameter.shape[1:])) ** -0.5)
    some = views[:: max(1, len(views) // 64)]

    use = REGISTRY["llm2clip-l-14-336"].clip
    assert use is not None
    mean, std = (torch.tensor(each, device=DEVICE).view(1, 3, 1, 1) for each in (use.mean, use.std))

    def look(model: Any, size: int) -> Any:
        pixels = F.interpolate(some, size=(size, size), mode="bicubic")
        return torch.cat([model((each - mean) / std) for each in pixels.split(8)])

    with torch.autocast(DEVICE, torch.float16, enabled=DEVICE == "cuda"):
        head = [module for module in clip.visual.modules() if isinstance(module, nn.Linear)][-1]
        spread(head, inputs(head, lambda: look(clip.encode_image, 224)))
        common = look(clip.encode_image, 224).float().mean(0)
        projection = clip.text_projection.data.clone()
        clip.text_projection.data = torch.eye(len(projection), device=DEVICE)
        words = clip.encode_text(open_clip.get_tokenizer("convnext_large_d")(prompts).to(DEVICE)).float()
        centre = words.mean(0)
        length = 0.45 * (words @ projection).norm(dim=1).mean()
        clip.text_projection.data = projection + torch.outer(
            centre / centre.square().sum(), common / common.norm() * length
        )
        layer = tower.visual_projection
        spread(layer, inputs(layer, lambda: look(lambda x: tower(x).image_embeds, 336)), 2.0)
    features = inputs(net.score_head, lambda: [net(each) for each in some.split(8)])
    _, _, components = torch.pca_lowrank(features, 2)
    logits = features @ components[:, 0]
    gain = 0.8 / logits.std()
    net.score_head.weight.copy_((components[:, 0] * gain)[None])
    net.score_head.bias.fill_(-float(logits.mean() * gain))
    for name, parameter in alexnet.named_parameters():
        nn.init.kaiming_normal_(parameter) if name.endswith("weight") else parameter.fill_(-1.0)

    for name in ("clip", "image_clip", "quality", "lpips"):
        (folder / name).mkdir()
    about = {"model_cfg": open_clip.get_model_config("convnext_large_d"), "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(about))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "clip/open_clip_model.safetensors")
    about = {"vision_config": config.to_dict(), "projection_dim": config.projection_dim}
    (folder / "image_clip/config.json").write_text(json.dumps(about))
    state = {k: v.contiguous() for k, v in tower.state_dict().items()}
    save_file(state | {"text_adapter.0.weight": torch.zeros(2)}, folder / "image_clip/model.safetensors")
    with tempfile.TemporaryDirectory() as kept:
        net.backbone.save_pretrained(kept)  # in the published naming
        from safetensors.torch import load_file

        state = {f"backbone.{key}": value for key, value in load_file(Path(kept) / "model.safetensors").items()}
    state |= {f"score_head.{key}": value for key, value in net.score_head.state_dict().items()}
    save_file(state | {"emb_head.weight": torch.zeros(256, net.score_head.in_features)}, folder / "quality" / WEIGHTS)
    state = {f"features.{key}": value.cpu() for key, value in alexnet.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / "lpips/alexnet-owt-7be5be79.pth")


def load_ours(folder: Path, offload: bool = False) -> SelfCheck:
    names = {"clip": "clip-convnext-large-d", "image_clip": "llm2clip-l-14-336", "quality": "404-gen-quality"}
    entries = {stage: REGISTRY[name] for stage, name in {**names, "lpips": "alexnet"}.items()}
    choices = {
        stage: ModelChoice(model=entry.name, dtype="float16" if stage == "image_clip" else "float32")
        for stage, entry in entries.items()
    }
    models: Any = SimpleNamespace(**choices, offload_self_check=offload)
    ours = SelfCheck.load({stage: folder / stage for stage in entries}, entries, models, DEVICE)
    assert ours._lpips is not None
    lins: Any = ours._lpips._net.lins  # a ModuleList that is annotated as a list
    for layer in lins.parameters():
        layer.data *= LPIPS_GAIN
    return ours


def full(folder: Path, splats: list[bytes]) -> bool:
    prompts = ["a red cube", "a wooden chair with four legs", "a green mug", "an old car", "a robot, holding a hammer"]
    asked: list[tuple[bytes, str | Image.Image, bytes]] = []
    with tempfile.TemporaryDirectory() as work:
        weights = Path(work)
        frames = [to_validators_frame(ply.read(splat).to(DEVICE)) for splat in splats]
        views = [render_views(frame) for frame in frames]
        draw(weights, torch.cat(views), prompts)
        for i, splat in enumerate(splats):
            asked.append((splat, prompts[i % len(prompts)], b""))
            size = (300 + 90 * i, 640 - 30 * i)
            shown = (views[i][3] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            picture = Image.fromarray(shown).resize(size)
            if i % 2:
                picture.putalpha(Image.linear_gradient("L").resize(size))
            file = io.BytesIO()
            picture.save(file, "PNG")
            target = picture
            if i % 2:
                target = Image.alpha_composite(Image.new("RGBA", size, "white"), picture)
            asked.append((splat, target.convert("RGB"), file.getvalue()))
        ours = load_ours(weights)
        found = [ours.check(ply.read(splat).to(DEVICE), prompt) for splat, prompt, _ in asked]
        if DEVICE == "cuda":
            cost(ours, weights)
        del ours
        torch.cuda.empty_cache()
        theirs, their_views = run_authors(folder, weights, asked)
    worst = dict.fromkeys([*NAMES, "score", "views"], 0.0)
    for (_, prompt, _), mine, other, seen in zip(asked, found, theirs, their_views, strict=True):
        assert mine.views is not None
        assert mine.score is not None
        values: dict[str, Any] = {**mine.parts, "score": mine.score}
        print(f"{'text' if isinstance(prompt, str) else 'picture'}: {lines(other, values)}")
        difference = (mine.views - seen).abs()
        levels = float((difference > 0).float().mean())
        print(f"  views: mean {float(difference.mean()):.1e}, {levels:.1e} of the values differ", flush=True)
        for part, value in other.items():
            worst[part] = max(worst[part], abs(values[part] - value))
        worst["views"] = max(worst["views"], float(difference.mean()))
    print("largest differences: " + ", ".join(f"{part} {value:.1e}" for part, value in worst.items()))
    return max(worst.values()) <= LIMIT


def run_authors(
    folder: Path, weights: Path, asked: list[tuple[bytes, str | Image.Image, bytes]]
) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Their answers and views. Their code changes torch's default device, so nothing of ours comes after it."""
    tower = CLIPVisionModelWithProjection.from_pretrained(weights / "image_clip", dtype=torch.float16)
    net = QualityNet.load(weights / "quality")
    features = torchvision.models.alexnet(weights=None)
    state = torch.load(weights / "lpips/alexnet-owt-7be5be79.pth", weights_only=True)
    features.load_state_dict(state, strict=False)
    create = open_clip.create_model_and_transforms
    clip_file = str(weights / "clip/open_clip_model.safetensors")
    answers, views = [], []
    with authors(folder) as load:
        alignment, quality = load("engine.metrics.alignment_scorer"), load("engine.models.quality_model")
        similarity, pipeline = load("engine.metrics.similarity_scorer"), load("server.pipeline")
        engine = load("engine.validation_engine").ValidationEngine()

        def as_ours(model: Any, file: str, strict: bool) -> None:
            model.score_head.load_state_dict(net.score_head.state_dict())

        def with_our_file(name: str, pretrained: str, device: torch.device) -> Any:
            return create(name, clip_file, device=device)

        image_model = SimpleNamespace(get_image_features=lambda pixels: tower(pixels).image_embeds)
        image_model.to = lambda device: tower.to(device) and image_model
        image_model.eval = lambda: tower.eval() and image_model
        similarity.float = one_number
        with (
            patch.object(open_clip, "create_model_and_transforms", with_our_file),
            patch.object(alignment.AutoModel, "from_pretrained", lambda *_, **__: image_model),
            patch.object(quality.Dinov2Model, "from_pretrained", lambda *_, **__: net.backbone),
            patch.object(quality, "hf_hub_download", lambda **_: ""),
            patch.object(quality, "load_model", as_ours),
            patch.object(quality, "safe_compile_model", lambda model, _: model),  # eager, as ours
            patch.object(torchvision.models, "alexnet", lambda **_: features),
        ):  # fmt: skip
            engine.load_pipelines()
        for layer in engine._similarity_metric._lpips_metric.net.lins.parameters():
            layer.data *= LPIPS_GAIN
        loader, renderer = load("engine.io.ply.loader").PlyLoader(), load("engine.rendering.renderer").Renderer()
        render = renderer.render_gs
        kept: list[list[Tensor]] = []

        def render_and_keep(*args: Any, **options: Any) -> list[Tensor]:
            kept.append(render(*args, **options))
            return kept[-1]

        renderer.render_gs = render_and_keep
        for splat, prompt, file in asked:
            data = base64.b64encode(splat).decode()
            if isinstance(prompt, str):
                request = pipeline.ValidationRequest(prompt=prompt, data=data)
                answer, _ = pipeline.decode_and_validate_txt(request, loader, renderer, engine)
            else:
                request = pipeline.ValidationRequest(prompt_image=base64.b64encode(file).decode(), data=data)
                answer, _ = pipeline.decode_and_validate_img(request, loader, renderer, engine)
            answers.append({**{part: getattr(answer, part) for part in NAMES}, "score": answer.score})
            views.append(torch.stack(kept[-1]).permute(0, 3, 1, 2).float() / 255)
    return answers, views


def timed(call: Callable[[], Any], times: int = 7) -> float:
    """Median seconds."""
    measured = []
    for _ in range(times + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[2:])


@torch.no_grad()
def cost(ours: SelfCheck, weights: Path) -> None:
    """Seconds of the whole self-check and of its parts, and what it takes of the GPU's memory."""
    assert ours._image is not None
    assert ours._quality is not None
    assert ours._lpips is not None
    splat = fit_to_frame(rough(1, 100_000).to(DEVICE))
    picture = Image.new("RGB", (512, 512), "red")
    print(torch.cuda.get_device_name(), f"memory held by all models {torch.cuda.memory_allocated() / 1e9:.2f} GB")
    for count in (1, 4):
        prompt: str | Image.Image
        for prompt in ("a red cube", picture):
            together: list[Any] = [(splat, prompt)] * count
            torch.cuda.reset_peak_memory_stats()
            seconds = timed(partial(ours.check_all, together, fit=True))
            kind = "text" if isinstance(prompt, str) else "picture"
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(f"{count} x {kind}: {seconds:.3f} s, peak {peak:.2f} GB", flush=True)
    views = render_views(to_validators_frame(splat))
    from generation.stages.self_check.similarity import neighbour_ssim

    parts = {
        "views": lambda: render_views(to_validators_frame(splat)),
        "text model": lambda: ours._text.embed(views),
        "picture model": lambda: ours._image.embed(views),
        "quality": lambda: ours._quality.score(views),
        "SSIM": lambda: neighbour_ssim(views),
        "LPIPS": lambda: ours._lpips.distances(views),
    }
    for name, call in parts.items():
        print(f"  {name}: {timed(call) * 1000:.1f} ms")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    offloaded = load_ours(weights, offload=True)
    print(f"offloaded: {(torch.cuda.memory_allocated() - before) / 1e9:.2f} GB held")
    for prompt in ("a red cube", picture):
        seconds = timed(partial(offloaded.check_all, [(splat, prompt)], fit=True))
        print(f"  1 x {'text' if isinstance(prompt, str) else 'picture'}: {seconds:.3f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--splats", type=Path)
    parser.add_argument("--golden", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        return 0 if compare_small(arguments.validation, arguments.golden) else 1
    splats = [path.read_bytes() for path in sorted(arguments.splats.glob("*.ply"))] if arguments.splats else []
    splats += [ply.write(rough(seed)) for seed in range(max(4, 8 - len(splats)))]
    return 0 if full(arguments.validation, splats) else 1


if __name__ == "__main__":
    sys.exit(main())
