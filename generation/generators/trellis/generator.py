"""TRELLIS as a generator: a picture's features, a structure, its latents, their Gaussians."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from generation.accelerate.cuda_graph import GraphedFunction
from generation.accelerate.offload import Offloaded
from generation.accelerate.pinned import copy_async
from generation.generators.base import Checkpoint, CutoutFrame, NoSplat, Parts, Subject, Work
from generation.generators.trellis.condition import Condition
from generation.generators.trellis.layers import FlowBlock, FlowBlocks
from generation.generators.trellis.options import TrellisOptions
from generation.generators.trellis.sampler import Step, schedule
from generation.generators.trellis.sparse import Voxels
from generation.generators.trellis.splats import capped, sharpened, to_gaussians
from generation.generators.trellis.weights import Networks
from generation.splats.gaussians import Gaussians

Velocities = list[tuple[Tensor, Tensor | None]]

#: its authors scale the object's longer side to 1 / 1.2 of the picture's
BORDER = 1 - 1 / 1.2


def load(options: TrellisOptions, parts: Parts) -> Trellis:
    """Raises WeightsError when a checkpoint can not be used."""
    networks = parts.load("trellis", load_networks)
    return Trellis(networks, parts.load("dinov2", load_condition), options, parts.device)


def load_networks(checkpoint: Checkpoint) -> Networks:
    """TRELLIS's networks. Raises WeightsError."""
    return Networks.load(checkpoint.folder, checkpoint.device, checkpoint.dtype)


def load_condition(checkpoint: Checkpoint) -> Condition:
    """The image features' DINOv2. Raises WeightsError."""
    return Condition.load(checkpoint.folder, checkpoint.device, checkpoint.dtype)


class TrellisWork:
    """A ``generation.generators.base.Work``."""

    def __init__(self, cutout: Tensor, structure: Tensor, generator: torch.Generator, steps: int) -> None:
        self.cutout = cutout
        self.structure = structure  # (structures, C, R, R, R) noisy latents of the structure flow
        self.generator = generator
        self.features: Tensor | None = None
        self.context: Tensor | None = None  # of the current flow
        self.voxels: Voxels | None = None
        self.latents: Tensor | None = None  # (N, C), from when its voxels are known
        self.step = 0  # of the current flow
        self._taken, self._steps = 0, steps  # steps done in both flows, and their total
        self._result: Gaussians | NoSplat | None = None

    @property
    def fraction(self) -> float:
        return self._taken / self._steps

    @property
    def done(self) -> bool:
        return self._result is not None

    def gaussians(self) -> Gaussians:
        """Raises NoSplat: why there are none."""
        if isinstance(self._result, NoSplat):
            raise NoSplat(*self._result.args)  # a new one: raised itself, it would keep all jobs of the tick in a cycle
        assert self._result is not None
        return self._result

    def take(self) -> None:
        self.step += 1
        self._taken += 1

    def end(self, result: Gaussians | NoSplat) -> None:
        self._result = result
        self.context, self.latents, self.voxels = None, None, None


class Trellis:
    """See ``generation.generators.base.Generator``. Works that are in the same flow share its steps."""

    name = "trellis"

    def __init__(self, networks: Networks, condition: Condition, options: TrellisOptions, device: str) -> None:
        self._networks, self._condition, self._options, self._device = networks, condition, options, device
        self.cutout: CutoutFrame | None = CutoutFrame(condition.size, BORDER)
        o = options
        self._structure_steps = schedule(o.structure_steps, o.structure_rescale, o.structure_interval)
        self._slat_steps = schedule(o.slat_steps, o.slat_rescale, o.slat_interval)
        self._offloaded = [Offloaded(network, device) for network in self._all()]
        self._alone = GraphedFunction(self._of_one)  # of one work; several keep the GPU busy by themselves
        self._joined: tuple[list[Voxels], int, Voxels, Voxels] | None = None

    def picture_prompt(self, words: str) -> str:
        return self._options.picture_prompt(words)

    def encode(self, texts: Sequence[str]) -> None:
        """Does nothing: it takes no text."""

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        return {}

    def prefetch(self, words: str, seed: int) -> Any:
        return None

    def offload(self) -> None:
        self._alone.forget()
        for each in self._offloaded:
            each.offload()

    def onload(self) -> None:
        for each in self._offloaded:
            each.onload()

    def _all(self) -> list[nn.Module]:
        n = self._networks
        return [self._condition, n.structure_flow, n.structure_decoder, n.slat_flow, n.gaussian_decoder]

    @torch.no_grad()
    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        if not self._device.startswith("cuda"):
            return
        progress("compiling TRELLIS, or loading it from its cache")
        compile_blocks(self._networks.structure_flow.blocks)
        compile_blocks(self._networks.slat_flow.blocks)
        size = self._condition.size
        resolution = self._networks.slat_flow.resolution
        axes = torch.arange(resolution, device=self._device) - resolution / 2
        ball = torch.argwhere(
            torch.cartesian_prod(axes, axes, axes).norm(dim=1).view([resolution] * 3) < resolution / 4
        )
        for count in sorted({1, min(2, most), most}):
            progress(f"making {count} with TRELLIS, to warm up")
            cutouts = torch.rand(count, 4, size, size, device=self._device)
            works = [self.begin(Subject("", cutout, seed)) for seed, cutout in enumerate(cutouts)]
            self._see(works)
            if count == 1:
                times = torch.ones(self._options.structures, device=self._device)
                for guided in (self._options.structures, 0):
                    self._alone.capture(works[0].structure, times, *_contexts(works), constants=(guided,))
            for guided in range(count + 1):
                self._velocities(works, [Step(1.0, 0.9, number < guided) for number in range(count)])
            for work in works:
                self._found(work, ball)
            for guided in range(count + 1):
                self._slat_velocities(works, [Step(1.0, 0.9, number < guided) for number in range(count)])
            self._decode(works)

    def begin(self, subject: Subject) -> TrellisWork:
        """Noise comes from the CPU, the structures' first, as its authors draw it."""
        assert subject.cutout is not None
        flow = self._networks.structure_flow
        generator = torch.Generator().manual_seed(subject.seed)
        noise = torch.randn(self._options.structures, flow.channels, *[flow.resolution] * 3, generator=generator)
        steps = len(self._structure_steps) + len(self._slat_steps)
        return TrellisWork(subject.cutout, copy_async(noise, self._device), generator, steps)

    @torch.no_grad()
    def tick(self, works: Sequence[Work]) -> None:
        """One step of each work's current flow. Encodes before the first step and decodes after the last one."""
        own = [work for work in works if isinstance(work, TrellisWork)]
        if fresh := [work for work in own if work.features is None]:
            self._see(fresh)
        in_structure = [work for work in own if work.latents is None]
        in_latents = [work for work in own if work.latents is not None]
        for inside, steps, flow in (
            (in_structure, self._structure_steps, self._step_structures),
            (in_latents, self._slat_steps, self._step_latents),
        ):
            # Works that are guided in this step come first, as the flows expect.
            inside.sort(key=lambda work: not steps[work.step].guided)
            if inside:
                flow(inside, [steps[work.step] for work in inside])
            for work in inside:
                work.take()
        if ready := [work for work in in_structure if work.step == len(self._structure_steps)]:
            self._find_voxels(ready)
        if ready := [work for work in in_latents if work.step == len(self._slat_steps)]:
            self._decode(ready)

    def _see(self, works: list[TrellisWork]) -> None:
        features = self._condition(torch.stack([work.cutout for work in works]).to(self._device))
        for work, seen in zip(works, features, strict=True):
            work.features = seen
            work.context = self._networks.structure_flow.project_context(seen)

    def _step_structures(self, works: list[TrellisWork], steps: list[Step]) -> None:
        for work, step, (conditional, unconditional) in zip(works, steps, self._velocities(works, steps), strict=True):
            work.structure = step.apply(work.structure, conditional, unconditional, self._options.structure_guidance)

    def _velocities(self, works: list[TrellisWork], steps: list[Step]) -> Velocities:
        """Velocities of the works' structures at their steps. Guided works come first."""
        each, guided = self._options.structures, sum(step.guided for step in steps)
        x, times = torch.cat([work.structure for work in works]), self._times(steps, each)
        contexts = _contexts(works)
        if len(works) == 1:
            (out,) = self._alone(x, times, *contexts, constants=(guided * each,))
        else:
            contexts = [context for context in contexts for _ in range(each)]
            out = self._networks.structure_flow(x, times, contexts, guided * each)
        return _pairs(out.split(each), len(works))

    def _of_one(self, x: Tensor, times: Tensor, context: Tensor, guided: int) -> tuple[Tensor]:
        """Velocities of one work's structures."""
        return (self._networks.structure_flow(x, times, [context] * len(x), guided),)

    def _times(self, steps: list[Step], each: int) -> Tensor:
        """Times of the steps, filled in on the device: a copy to it would synchronise."""
        return torch.cat([torch.full((each,), 1000 * step.t, device=self._device) for step in steps])

    def _find_voxels(self, works: list[TrellisWork]) -> None:
        logits = self._networks.structure_decoder(torch.cat([work.structure for work in works]))
        for work, own in zip(works, logits[:, 0].split(self._options.structures), strict=True):
            found = [torch.argwhere(each > 0) if bool(each.isfinite().all()) else None for each in own]
            counts = [0 if cells is None else len(cells) for cells in found]
            usable = [(count, cells) for count, cells in zip(counts, found, strict=True) if cells is not None]
            usable = [(count, cells) for count, cells in usable if 0 < count <= self._options.max_voxels]
            if usable:
                self._found(work, min(usable, key=lambda pair: pair[0])[1])
            elif all(cells is None for cells in found):
                work.end(NoSplat("structure: its values are not finite"))
            elif not any(counts):
                work.end(NoSplat("structure: it has no voxel"))
            else:
                least = min(count for count in counts if count)
                work.end(NoSplat(f"structure: {least} voxels are over the limit of {self._options.max_voxels}"))

    def _found(self, work: TrellisWork, cells: Tensor) -> None:
        """Begin the second flow on the voxels ``cells`` (N, 3)."""
        flow = self._networks.slat_flow
        assert work.features is not None
        work.voxels = Voxels.of(cells, flow.resolution)
        work.latents = copy_async(torch.randn(len(cells), flow.channels, generator=work.generator), self._device)
        work.context = flow.project_context(work.features)
        work.step = 0

    def _step_latents(self, works: list[TrellisWork], steps: list[Step]) -> None:
        for work, step, (conditional, unconditional) in zip(
            works, steps, self._slat_velocities(works, steps), strict=True
        ):
            assert work.latents is not None
            work.latents = step.apply(work.latents, conditional, unconditional, self._options.slat_guidance)

    def _slat_velocities(self, works: list[TrellisWork], steps: list[Step]) -> Velocities:
        """Velocities of the works' latents, as ``_velocities``."""
        x = torch.cat([work.latents for work in works if work.latents is not None])
        samples = [work.voxels for work in works if work.voxels is not None]
        voxels, doubled = self._join(samples, sum(step.guided for step in steps))
        out = self._networks.slat_flow(x, self._times(steps, 1), _contexts(works), voxels, doubled)
        return _pairs(out.split(doubled.fine.lengths), len(works))

    def _join(self, samples: list[Voxels], guided: int) -> tuple[Voxels, Voxels]:
        """All voxels, and the same followed by the first ``guided`` once more. Cached for the next step."""
        if self._joined is not None:
            before, count, voxels, doubled = self._joined
            if count == guided and len(before) == len(samples) and all(map(operator.is_, before, samples)):
                return voxels, doubled
        voxels = Voxels.join(samples)
        doubled = Voxels.join([*samples, *samples[:guided]])
        self._joined = (samples, guided, voxels, doubled)
        return voxels, doubled

    def _decode(self, works: list[TrellisWork]) -> None:
        networks = self._networks
        samples = [work.latents for work in works if work.latents is not None]
        latents = torch.cat(samples) * networks.std + networks.mean
        voxels, _ = self._join([work.voxels for work in works if work.voxels is not None], 0)
        self._joined = None  # its last use
        made = [to_gaussians(raw) for raw in networks.gaussian_decoder(latents, voxels.fine)]
        finite = torch.stack([_is_finite(gaussians) for gaussians in made])
        results = [sharpened(capped(gaussians, self._options.max_gaussians)) for gaussians in made]
        for work, gaussians, usable in zip(works, results, finite.tolist(), strict=True):  # here the CPU waits, once
            if usable:
                work.end(gaussians)
            else:
                work.end(NoSplat("latents: they, or the Gaussians made of them, are not finite"))


def _is_finite(gaussians: Gaussians) -> Tensor:
    return torch.stack([field.isfinite().all() for field in gaussians.tensors().values()]).all()


def _contexts(works: Sequence[TrellisWork]) -> list[Tensor]:
    return [work.context for work in works if work.context is not None]


def _pairs(parts: Sequence[Tensor], works: int) -> Velocities:
    """(conditional, unconditional) velocity of each work; the latter exists for the first works only."""
    return list(zip_longest(parts[:works], parts[works:]))


_PARTS = ("before", "between", "after")


def compile_blocks(blocks: FlowBlocks) -> None:
    """Compile the parts between attentions, once for all blocks and numbers of tokens."""
    torch._dynamo.config.recompile_limit = 128
    for block in blocks:
        for part in _PARTS:
            setattr(block, part, partial(_compiled(part), block))


def _compiled(part: str) -> Callable[..., Any]:
    if part not in _COMPILED:
        _COMPILED[part] = torch.compile(getattr(FlowBlock, part), fullgraph=True, dynamic=True)
    return _COMPILED[part]


_COMPILED: dict[str, Callable[..., Any]] = {}
