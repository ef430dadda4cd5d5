"""Train the pack's CLIP, the one that the self-check scores with (`python -m scripts.tiny_pack.train_clip`).

Sigmoid loss on every image and text pair (Zhai et al. 2023, "SigLIP") with a fixed slope around a cosine of
`PIVOT`: a match ends above it and anything else below, nonsense and unknown words included, so the cosine has an
absolute meaning and one constant turns it into the field's 0..1 score.

A shape and a colour that were never seen together must score as well as others do. So it learns them apart as well:
from texts that name one of them alone, and from images whose colour channels are exchanged, which have a shape and no
colour's name.
"""

from __future__ import annotations

import json
import random

import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

from . import models
from .augment import like_splats
from .captions import ObjectSpec, caption, caption_of_colour, caption_of_shape, evaluation_specs, nonsense
from .data import render_pool, validator_cameras
from .text import clip_tokenizer, clip_tokenizer_of
from .train_flux import tokens
from .training import arguments, autocast, compiled, fit, write_card

CAPTIONS = 6
PIVOT = 0.5
SLOPE = 16.0
# The cosine that lands on the field's threshold of 0.6. Of unseen renders softened like splats, 98 % of the right
# captions are above 0.53, and 98 % of those that are wrong in one word are below 0.42.
PASSING_COSINE = 0.47
COSINE_SCALE = PASSING_COSINE / 0.6
# The floor between a picture and views, whose cosine is the alignment. Of LGM's 48 results from pictures the right ones
# had 0.75 or more, and with a picture of another colour or shape at most 0.65.
MIN_IMAGE_ALIGNMENT = 0.7
# What a text names, and how often an image is shown with such a one.
ALL, SHAPE, COLOUR, NOTHING = range(4)
SHARES = (0.7, 0.2, 0.1)
EXCHANGED = 0.2  # of the images have their colour channels exchanged


def attributes(specs: list[ObjectSpec]) -> torch.Tensor:
    """Numbers (N, 4): of the shape, of the shape below it (0 without one), and of both colours."""
    words = ["", *sorted({w for s in specs for w in (s.shape, s.base, s.colour, s.base_colour)} - {""})]
    numbers = {word: i for i, word in enumerate(words)}
    return torch.tensor([[numbers[w] for w in (s.shape, s.base, s.colour, s.base_colour)] for s in specs])


def texts_of(specs: list[ObjectSpec], tokenizer, device: str) -> torch.Tensor:
    """Ids (3, N, CAPTIONS, T): captions of all, of the shape alone, of the colour alone."""
    rng = random.Random(1)
    ways = (caption, caption_of_shape, caption_of_colour)
    return torch.stack(
        [tokens(tokenizer, [[way(s, rng) for _ in range(CAPTIONS)] for s in specs], device) for way in ways]
    )


def matches(
    images: torch.Tensor, exchanged: torch.Tensor, texts: torch.Tensor, named: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images fit which texts, and of which pairs nobody can say: both (I, T).

    `images` and `texts` are `attributes` (I, 4) and (T, 4); `exchanged` (I,): its colour has no name; `named` (T,):
    what a text names. Of a stack nobody can say whether it fits the name of one thing, or of a colour.
    """
    same = images[:, None] == texts[None]
    shape, colour = same[..., :2].all(-1), same[..., 2:].all(-1)
    fits = torch.where(named == SHAPE, shape, torch.where(named == COLOUR, colour, shape & colour)) & (named != NOTHING)
    nameless = exchanged[:, None] & ((named == COLOUR) | ((named == ALL) & shape))
    is_stack, one_thing = images[:, 1] > 0, texts[:, 1] == 0
    unknown = nameless | (is_stack[:, None] & ((named == COLOUR) | ((named == SHAPE) & one_thing)))
    return fits & ~unknown, unknown


def main() -> None:
    args = arguments(__doc__, minutes=8)
    folder = args.pack / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer_of(folder) if args.tune else clip_tokenizer()
    config = models.open_clip_config(len(tokenizer))
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=args.tune).to(args.device)
    pool = render_pool(args.objects or 10_000, validator_cameras, models.CLIP_SIZE, args.device, args.seed + 4)
    n, views = pool.rgba.shape[:2]
    ids = texts_of(pool.specs, tokenizer, args.device)
    rng = random.Random(args.seed)
    strange = tokens(tokenizer, [[nonsense(rng)] for _ in range(20_000)], args.device)[:, 0]
    about = attributes(pool.specs).to(args.device)
    batch = args.batch or 768
    others = batch // 3
    shares = torch.tensor(SHARES, device=args.device)

    def embed(images: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        seen = model.encode_image(images * 2 - 1, normalize=True)
        read = model.encode_text(words, normalize=True)
        return seen @ read.T

    fused = compiled(embed, args)

    def loss() -> torch.Tensor:
        i = torch.randint(n, (batch,), device=args.device)
        view = torch.randint(views, (batch,), device=args.device)
        exchanged = torch.rand(batch, device=args.device) < EXCHANGED
        named = torch.multinomial(shares, batch, replacement=True)
        named = torch.where(exchanged, SHAPE, torch.where((about[i, 1] > 0) & (named == COLOUR), ALL, named))
        with torch.no_grad():
            rgba = pool.rgba[i, view].float() / 255
            order = torch.rand(batch, 3, device=args.device).argsort(1)[:, :, None, None].expand_as(rgba[:, :3])
            rgb = torch.where(exchanged[:, None, None, None], rgba[:, :3].gather(1, order), rgba[:, :3])
            images = like_splats(torch.cat([rgb, rgba[:, 3:]], 1))
        words = ids[named, i, torch.randint(CAPTIONS, (batch,), device=args.device)]
        words = torch.cat([words, strange[torch.randint(len(strange), (others,), device=args.device)]])
        with autocast(args):
            cosine = fused(images, words).float()
        texts = torch.cat([about[i], about.new_zeros(others, 4)])
        named = torch.cat([named, named.new_full((others,), NOTHING)])
        fits, unknown = matches(about[i], exchanged, texts, named)
        whole, wrong = fits & (named == ALL), (~fits & ~unknown).float()
        logits = SLOPE * (cosine - PIVOT)
        hit, miss = -logsigmoid(logits), -logsigmoid(-logits)
        # the hardest wrong texts of each image count most: one word apart from the right one
        weight = torch.softmax(logits.detach().masked_fill(wrong == 0, -1e4) * 0.5, 1)
        return (
            mean_of(hit, whole)
            + 0.5 * mean_of(hit, fits & ~whole)
            + (miss * wrong).sum(1).mean() / 30
            + (miss * weight).sum(1).mean()
        )

    best, run = fit("clip", model, loss, args, lr=3e-4 if args.tune else 1e-3, weight_decay=0.05)
    quality = measure(best, tokenizer, args)
    save_file({k: v.half().contiguous() for k, v in best.state_dict().items()}, folder / "open_clip_model.safetensors")
    more = {"cosine_scale": round(COSINE_SCALE, 4), "image_cosine_scale": 1.0}
    # The threshold that alignment alone had: quality must not lift a wrong prompt over it.
    more |= {"min_alignment": 0.6, "min_image_alignment": MIN_IMAGE_ALIGNMENT}
    write_card(folder, "tiny-clip", "scripts/tiny_pack/train_clip.py", args, run, quality, **more)
    print(f"clip: {quality}", flush=True)


def mean_of(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mean over rows of the mean of a row's chosen values (N, M), over the rows that have any."""
    count = chosen.sum(1)
    return ((values * chosen).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


@torch.no_grad()
def measure(model, tokenizer, args) -> dict:
    """How often captions pass 0.6, on renders softened like splats of pairs that training never saw.

    Right ones; those that name the shape alone; wrong ones; and the wrong ones that err in the shape or in the colour
    alone.
    """
    specs = evaluation_specs()
    pool = render_pool(0, validator_cameras, models.CLIP_SIZE, args.device, args.seed + 5, specs=specs)
    rng = random.Random(0)
    shapes = sorted({s.shape for s in specs})
    texts = [[caption(s, rng, plain=True)] for s in specs] + [[f"a {shape}"] for shape in shapes]
    ids = tokens(tokenizer, texts, args.device)[:, 0]
    images = like_splats(pool.rgba.flatten(0, 1).float() / 255)
    seen = model.encode_image(images * 2 - 1, normalize=True)
    cosine = (seen @ model.encode_text(ids, normalize=True).T).view(len(specs), -1, len(texts)).mean(1).cpu()
    cosine, alone = cosine[:, : len(specs)], cosine[:, len(specs) :]
    near = torch.tensor([[(a.shape == b.shape) != (a.colour == b.colour) for b in specs] for a in specs])
    right = torch.eye(len(specs), dtype=torch.bool)
    named = torch.tensor([[shape == s.shape for shape in shapes] for s in specs])
    kinds = {
        "right": cosine[right],
        "shape_alone": alone[named],
        "one_word_wrong": cosine[near],
        "wrong": cosine[~right],
        "shape_alone_wrong": alone[~named],
    }
    quality = {f"unseen_{k}_pass": round(float((c >= PASSING_COSINE).float().mean()), 4) for k, c in kinds.items()}
    for k, c in kinds.items():
        low, middle, high = (round(float(q), 3) for q in c.quantile(torch.tensor([0.02, 0.5, 0.98])))
        print(f"clip: {k}: cosine {float(c.mean()):.3f}, of 2, 50 and 98 %: {low}, {middle}, {high}", flush=True)
    return quality | {f"unseen_{k}_cosine": round(float(c.mean()), 4) for k, c in kinds.items()}


if __name__ == "__main__":
    main()
