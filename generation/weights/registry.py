"""The registry of checkpoints: source, revision, size and licence of each.

Most are repositories of the Hugging Face hub, one is a file at an address of its own, with its SHA-256.

Revisions are commit hashes that at least two public projects name. Where none was found the entry says ``main`` and
``pinned`` is False: the download script then records the commit that it got (``generation.weights.lock``), and later
starts take that one. Files whose SHA-256 is on public record are held to it, pinned or not. Sizes are what the hub or
public records of a download say, of the files that are used; None where neither was found (the download script asks the
hub).
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from generation.schema.score import MIN_ALIGNMENT

if TYPE_CHECKING:
    from generation.schema.options import ModelChoice


class WeightsError(ValueError):
    """Weights that are missing or can not be used. The message names the model and what to do."""


class MissingWeights(WeightsError):
    """Weights of which a file is not on this machine."""


@dataclass(frozen=True)
class ClipUse:
    """How a CLIP model's cosines become a score of 0 to 1, and how pixels are prepared for that."""

    cosine_scale: float  # the text-image cosine that counts as 1
    image_cosine_scale: float = 1.0  # the same for image-image cosines
    # None: as the model's own preprocessing says
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    # an alignment of a text, or of a picture, under this makes the final score 0
    min_alignment: float = MIN_ALIGNMENT
    min_image_alignment: float = MIN_ALIGNMENT


@dataclass(frozen=True)
class Entry:
    """One checkpoint: a Hugging Face repository at a revision, a file at an address, or a folder with ``card.json``."""

    name: str
    licence: str
    revision: str
    repo: str | None = None
    url: str | None = None  # of the only file
    size: int = 0  # bytes of that file; its revision is its SHA-256
    folder: Path | None = None
    files: tuple[str, ...] = ()  # glob patterns of the repository's files that are used, each matching something
    sha256: tuple[tuple[str, str], ...] = ()  # of some of them, where public records have it
    size_gb: float | None = None  # 10^9 bytes; None: not known
    gated: bool = False  # the hub wants its licence accepted before it hands the files out
    front_azimuth: float = 0.0  # degrees: azimuth of the front view in a multi-view model's training data
    clip: ClipUse | None = None  # of a CLIP model

    @property
    def pinned(self) -> bool:
        """Whether the revision is a hash, so that it can not change under us."""
        return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.revision) is not None

    @property
    def is_downloaded(self) -> bool:
        """Whether its files come from the network, and not with a folder."""
        return self.repo is not None or self.url is not None


# The validators' scorer gives its alignment models three times the mean and deviation that they were trained with.
_VALIDATORS_MEAN = (3 * 0.48145466, 3 * 0.4578275, 3 * 0.40821073)
_VALIDATORS_STD = (3 * 0.26862954, 3 * 0.26130258, 3 * 0.27577711)
_BIREFNET_FILES = ("config.json", "BiRefNet_config.py", "birefnet.py", "model.safetensors")
_ZERO123_FILES = (
    "unet/*",
    "vae/*",
    "image_encoder/*",
    "clip_camera_projection/*",
    "feature_extractor/*",
    "scheduler/*",
)
# The networks that make splats, with the SHA-256 of their weights.
_TRELLIS = {
    "ss_flow_img_dit_L_16l8_fp16": "96dc6bfd4136fd950af564dd16b4ae533c9ba6af8f26c670646b2a9f2789b1db",
    "ss_dec_conv3d_16l8_fp16": "1c76d4a40519aa2d711cc263a8404105231ac26db31d946bed48b84fee79009a",
    "slat_flow_img_dit_L_64l8p2_fp16": "693fb2a58ad497bd222007301eeec49d14d60f8c12d2f2f00c221fa747b4c66c",
    "slat_dec_gs_swin8_B_64l8gs32_fp16": "38c84bcef5ce0af1f48b1b5558dabc7575a13346043c41a7e0610f1fa619a161",
}
_LGM = "model_fp16_fixrot.safetensors"
# ImageDream's weights, with their SHA-256; text encoder and VAE are those of Stable Diffusion 2.1.
_IMAGEDREAM = {
    "unet/diffusion_pytorch_model": "28d8b241a54125fa0a041c1818a5dcdb717e6f5270eea1268172acd3ab0238e0",
    "vae/diffusion_pytorch_model": "3e4c08995484ee61270175e9e7a072b66a6e4eeb5f0c266667fe1f45b90daf9a",
    "text_encoder/model": "bc1827c465450322616f06dea41596eac7d493f4e95904dcb51f0fc745c4e13f",
    "image_encoder/model": "2a56cfd4ffcf40be097c430324ec184cc37187f6dafef128ef9225438a3c03c4",
}

REGISTRY = {
    entry.name: entry
    for entry in (
        Entry(
            name="flux.1-schnell",
            repo="black-forest-labs/FLUX.1-schnell",
            revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
            licence="Apache-2.0",
            size_gb=33.7,
            gated=True,
            files=(
                "model_index.json",
                "scheduler/*",
                "text_encoder/*",
                "text_encoder_2/*",
                "tokenizer/*",
                "tokenizer_2/*",
                "transformer/*",
                "vae/*",
            ),
        ),
        Entry(
            name="rmbg-2.0",
            repo="briaai/RMBG-2.0",
            revision="5df4c9c76d8170882c34f6986e848ee07fd0ba43",
            licence="CC BY-NC 4.0 (no commercial use without an agreement with BRIA)",
            size_gb=0.9,
            gated=True,
            files=_BIREFNET_FILES,
        ),
        Entry(
            name="birefnet",
            repo="ZhengPeng7/BiRefNet",
            revision="e2bf8e4460fc8fa32bba5ea4d94b3233d367b0e4",
            licence="MIT",
            size_gb=0.45,
            files=_BIREFNET_FILES,
        ),
        Entry(
            name="mvdream-sd2.1",
            repo="ashawkey/mvdream-sd2.1-diffusers",
            revision="main",
            licence="OpenRAIL",
            size_gb=2.6,
            files=("unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"),
            front_azimuth=90.0,  # DreamGaussian has its known view there under MVDream
        ),
        Entry(
            name="lgm-big",
            repo="ashawkey/LGM",
            revision="main",
            licence="MIT",
            size_gb=0.83,
            files=(_LGM,),
            sha256=((_LGM, "744d6324656342c64f871308e73db97f0eb51858d94329b30090e986a6d050ab"),),
        ),
        Entry(
            name="imagedream",
            repo="ashawkey/imagedream-ipmv-diffusers",
            revision="main",
            licence="OpenRAIL",
            size_gb=4.0,
            files=(
                "unet/*",
                "vae/*",
                "text_encoder/*",
                "tokenizer/*",
                "image_encoder/*",
                "feature_extractor/*",
                "scheduler/*",
            ),
            sha256=tuple((f"{part}.safetensors", digest) for part, digest in _IMAGEDREAM.items()),
            front_azimuth=90.0,  # LGM has its front view there under ImageDream
        ),
        Entry(
            name="zero123-xl",
            repo="ashawkey/zero123-xl-diffusers",
            revision="10e9e8e75adaa3bf77f5ac9c381419016fed68c7",
            licence="MIT (the authors' repository); made from Stable Diffusion, so CreativeML Open RAIL-M as well",
            files=_ZERO123_FILES,
        ),
        Entry(
            name="stable-zero123",
            repo="ashawkey/stable-zero123-diffusers",
            revision="a6c09344fbd45843d35f2095c203c4a8e55b4dbb",
            licence="Stability AI Non-Commercial Research Community License (no commercial use)",
            files=_ZERO123_FILES,
        ),
        Entry(
            name="trellis-image-large",
            repo="microsoft/TRELLIS-image-large",
            revision="25e0d31ffbebe4b5a97464dd851910efc3002d96",
            licence="MIT",
            size_gb=2.65,
            # without the decoders of meshes and radiance fields, and without encoders
            files=("pipeline.json", *(f"ckpts/{name}.{kind}" for name in _TRELLIS for kind in ("json", "safetensors"))),
            sha256=tuple((f"ckpts/{name}.safetensors", digest) for name, digest in _TRELLIS.items()),
        ),
        Entry(
            name="dinov2-with-registers-large",
            repo="facebook/dinov2-with-registers-large",
            revision="e4c89a4e05589de9b3e188688a303d0f3c04d0f3",
            licence="Apache-2.0",
            size_gb=1.2,
            files=("config.json", "model.safetensors"),
        ),
        Entry(
            name="clip-convnext-large-d",
            repo="laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg",
            revision="main",
            licence="MIT",
            size_gb=1.4,
            files=("open_clip_config.json", "open_clip_*model.*"),
            # The constant 0.35 belongs to the validators' way: 224 pixels where the model was made for 256.
            clip=ClipUse(cosine_scale=0.35, image_size=224, mean=_VALIDATORS_MEAN, std=_VALIDATORS_STD),
        ),
        Entry(
            name="llm2clip-l-14-336",
            repo="microsoft/LLM2CLIP-Openai-L-14-336",
            revision="92512331f393a003c3d98404677f991c188162c9",
            licence="Apache-2.0",
            size_gb=2.3,  # of which the vision tower is 1.2
            files=("config.json", "*.safetensors*"),
            clip=ClipUse(cosine_scale=1.0, image_size=336, mean=_VALIDATORS_MEAN, std=_VALIDATORS_STD),
        ),
        Entry(
            name="404-gen-quality",
            repo="404-Gen/validation",
            revision="948bf06988b630681c7bc468aebf2bbe010856f7",
            licence="not known (none is stated where it is used; made from DINOv2-small, Apache-2.0)",
            size_gb=0.09,
            files=("quality_scorer.safetensors",),
        ),
        Entry(
            name="alexnet",
            url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            files=("alexnet-owt-7be5be79.pth",),
            revision="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            licence="not known for the weights (ImageNet); the code around them, torchvision, is BSD-3-Clause",
            size_gb=0.24,
            size=244_408_911,
        ),
    )
}


def wanted(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that match a pattern, without other copies of the same weights.

    Of a folder with safetensors the pickles are left out, and a variant (``model.fp16.safetensors``) beside its plain
    file (``model.safetensors``).
    """
    matching = sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    safe = {name.rpartition("/")[0] for name in matching if name.endswith(".safetensors")}

    def is_copy(name: str) -> bool:
        pickled = name.endswith((".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"))
        plain = re.sub(r"\.[^./]+(\.safetensors|\.bin)$", r"\1", name)
        return (pickled and name.rpartition("/")[0] in safe) or (plain != name and plain in matching)

    return [name for name in matching if not is_copy(name)]


def lookup(choice: ModelChoice) -> Entry:
    """The entry that a models file chooses. Raises WeightsError for an unknown name or a folder without a card."""
    if Path(choice.model).is_absolute():
        return _from_card(Path(choice.model))
    try:
        entry = REGISTRY[choice.model]
    except KeyError:
        known = ", ".join(REGISTRY)
        raise WeightsError(f"model {choice.model!r} is unknown; known: {known}; a folder starts with ./ or /") from None
    if choice.revision is None:
        return entry
    return replace(entry, revision=choice.revision, sha256=())


def _from_card(folder: Path) -> Entry:
    """The entry of a folder: ``{"of": NAME}`` for a copy of a registry entry's files, else its own name and licence."""
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if "of" in card:
            return replace(REGISTRY[card["of"]], repo=None, url=None, folder=folder, revision="local")
        name, licence = str(card["name"]), str(card["licence"])
        scales = {key: float(card[key]) for key in ("cosine_scale", "image_cosine_scale") if key in card}
        floors = {key: float(card[key]) for key in ("min_alignment", "min_image_alignment") if key in card}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path}: must be a JSON card with name and licence, or with 'of', one of {', '.join(REGISTRY)} ({error!r})"
        ) from error
    for key, value in scales.items():
        if not 0 < value <= 1:
            raise WeightsError(f"{path}: {key}: {value} is outside of 0 (not included) to 1")
    for key, value in floors.items():
        if not 0 <= value <= 1:
            raise WeightsError(f"{path}: {key}: {value} is outside of 0 to 1")
    clip = None
    if "cosine_scale" in scales:
        clip = ClipUse(
            scales["cosine_scale"],
            scales.get("image_cosine_scale", 1.0),
            min_alignment=floors.get("min_alignment", MIN_ALIGNMENT),
            min_image_alignment=floors.get("min_image_alignment", MIN_ALIGNMENT),
        )
    return Entry(name=name, licence=licence, revision=str(card.get("revision", "local")), folder=folder, clip=clip)
