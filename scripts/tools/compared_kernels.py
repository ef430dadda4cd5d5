"""Compares the kernels and what is made of them with PyTorch's own, in Triton's interpreter or on a GPU.

    TRITON_INTERPRET=1 python -m scripts.tools.compared_kernels [cuda]

A process of its own, run by test_fused.py: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel

from generation.accelerate.fused import fuse_encoder
from generation.accelerate.kernels.group_norm import (
    Norm,
    add,
    add_with_statistics,
    compute_statistics,
    normalise,
    normalise_backward,
)
from generation.accelerate.kernels.small_group_norm import backward_small, forward_small, normalise_small
from generation.accelerate.unet import compile_unet

ModelT = TypeVar("ModelT", bound=torch.nn.Module)
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


def close(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    print(f"{what}: {error:.1e} of the largest value", flush=True)
    assert error < tolerance, what


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def check_kernels(shape: tuple[int, int, int, int], groups: int, added: bool, dtype: torch.dtype) -> None:
    n, c = shape[:2]
    x = (2 * random(*shape) + random(n, c, 1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = Norm((1 + random(c)).to(dtype), random(c).to(dtype), groups, 1e-5)
    more = random(c) if added else None
    more = None if more is None else more.to(dtype)
    outward, around = (random(*shape).to(dtype) for _ in range(2))

    wide = x.double().requires_grad_()
    shifted = wide if more is None else wide + more.double().view(1, c, 1, 1)
    expected = F.silu(F.group_norm(shifted, groups, norm.weight.double(), norm.bias.double(), norm.eps))
    (gradient,) = torch.autograd.grad(expected, wide, outward.double())

    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    for _ in range(2):  # the second time finds the counters as the first one left them
        statistics = compute_statistics(x, norm, more)
        name = f"{shape} in {groups} groups, {dtype}"
        close(f"{name}, forward", normalise(x, statistics), expected, tolerance)
        back = normalise_backward(outward, x, statistics, norm, around)
        close(f"{name}, backward", back, gradient + around.double(), tolerance)
        close(f"{name}, backward alone", normalise_backward(outward, x, statistics, norm), gradient, tolerance)

    small, statistics = forward_small(x, norm, more)
    close(f"{name}, forward small", small, expected, tolerance)
    for found, measured in zip(statistics, compute_statistics(x, norm, more), strict=True):
        close(f"{name}, measured small", found, measured, 1e-5)
    for other, wanted in ((around, gradient + around.double()), (None, gradient)):
        close(f"{name}, backward small", backward_small(outward, x, statistics, norm, other), wanted, tolerance)

    bias = random(c).to(dtype)
    outward, around = (each.contiguous(memory_format=torch.channels_last) for each in (outward, around))
    expected = outward.double() + around.double() + bias.double().view(1, c, 1, 1)
    total, statistics = add_with_statistics(outward, around, bias, norm)
    close(f"{name}, added", total, expected, tolerance)
    close(f"{name}, added alone", add(outward, around, bias), expected, tolerance)
    for found, measured in zip(statistics, compute_statistics(total, norm), strict=True):
        close(f"{name}, measured while added", found, measured, 1e-5)


def check_far_from_zero(shape: tuple[int, int, int, int], groups: int, deviations: float) -> None:
    """Values whose mean is so many of their deviations, in single precision: forward and backward."""
    c = shape[1]
    x = (deviations + random(*shape)).contiguous(memory_format=torch.channels_last)
    norm, more = Norm(1 + random(c), random(c), groups, 1e-5), deviations + random(c)
    outward = random(*shape).contiguous(memory_format=torch.channels_last)
    for added in (None, more):
        wide = x.double().requires_grad_()
        shifted = wide if added is None else wide + added.double().view(1, c, 1, 1)
        expected = F.silu(F.group_norm(shifted, groups, norm.weight.double(), norm.bias.double(), norm.eps))
        (gradient,) = torch.autograd.grad(expected, wide, outward.double())
        name = f"{shape} in {groups} groups, {deviations:g} deviations from 0"
        statistics = compute_statistics(x, norm, added)
        close(f"{name}, forward", normalise(x, statistics), expected, 1e-4)
        close(f"{name}, backward", normalise_backward(outward, x, statistics, norm), gradient, 1e-4)
        small, statistics = forward_small(x, norm, added)
        close(f"{name}, forward small", small, expected, 1e-4)
        close(f"{name}, backward small", backward_small(outward, x, statistics, norm), gradient, 1e-4)
    total, statistics = add_with_statistics(x, outward, more, norm)
    expected = F.silu(F.group_norm(total.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps))
    close(f"{name}, measured while added", normalise(total, statistics), expected, 1e-4)


def check_group_norm(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    n, c = shape[:2]
    x = (2 * random(*shape) + random(n, c, 1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, wide = (1 + random(c)).to(dtype), random(c).to(dtype), random(n, c + 8).to(dtype)
    for added, silu in ((None, False), (wide[:, 8:], True)):  # whose rows are not one after the other
        shifted = x.double() if added is None else x.double() + added.double()[:, :, None, None]
        expected = F.group_norm(shifted, groups, weight.double(), bias.double(), 1e-5)
        expected = F.silu(expected) if silu else expected
        ours = normalise_small(x, Norm(weight, bias, groups, 1e-5), added, silu)
        close(f"{shape} in {groups} groups small, {dtype}", ours, expected, 1e-5 if dtype == torch.float32 else 3e-3)


def check_autoencoder() -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=2,
    )
    vae = roughened(vae)
    vae.to(DEVICE)
    pixels = random(2, 3, 48, 40)  # of the two levels one is small
    outward = random(2, 8, 24, 20)

    def both_passes() -> tuple[torch.Tensor, torch.Tensor]:
        image = pixels.clone().requires_grad_()
        latents = vae.encode(image).latent_dist.parameters
        return latents.detach(), torch.autograd.grad(latents, image, outward)[0]

    before = both_passes()
    fuse_encoder(vae)
    for name, ours, theirs in zip(("forward", "backward"), both_passes(), before, strict=True):
        close(f"autoencoder, {name}", ours, theirs, 1e-4)


def check_unet() -> None:
    """On a GPU: what is compiled at full size runs as it is here."""
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    unet = roughened(unet)
    unet.to(DEVICE).requires_grad_(False)
    latents, steps, text = random(4, 4, 40, 40), torch.full((4,), 3, device=DEVICE), random(4, 7, 32)
    before = unet(latents, steps, text).sample
    compile_unet(unet)
    with torch.compiler.set_stance("force_eager"):
        close("UNet", unet(latents, steps, text).sample, before, 1e-3)


def roughened(model: ModelT) -> ModelT:
    """No bias is zero, no scale is one."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # what is compared with is to be exact
    half = torch.float16
    check_kernels((3, 20, 9, 7), 4, False, torch.float32)  # groups that are no power of two, pixels that fill no block
    check_kernels((2, 72, 9, 20), 9, True, torch.float32)  # groups across two programs' channels, several chunks
    check_kernels((2, 64, 16, 16), 32, True, half)
    check_far_from_zero((2, 72, 9, 20), 9, 300.0)
    check_far_from_zero((1, 16, 33, 31), 4, 300.0)
    check_group_norm((3, 20, 9, 7), 4, torch.float32)
    check_group_norm((2, 160, 16, 16), 16, half)  # four groups of a program, in lanes for more channels than they have
    check_group_norm((1, 300, 5, 4), 1, half)  # a group wider than a program should be
    check_autoencoder()
    if DEVICE != "cpu":
        for shape in ((4, 128, 256, 256), (16, 512, 32, 32), (32, 960, 32, 32), (8, 2560, 8, 8)):
            check_kernels(shape, 32, shape[0] > 4, half)
        check_far_from_zero((4, 128, 256, 256), 32, 300.0)
        for shape in ((32, 320, 32, 32), (32, 960, 32, 32), (8, 1920, 16, 16), (8, 2560, 8, 8), (32, 1280, 4, 4)):
            check_group_norm(shape, 32, half)
        check_unet()


if __name__ == "__main__":
    main()
