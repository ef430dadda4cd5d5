"""Sphere-traced renders of procedural objects: exact surfaces, any view, as many as wanted.

World and cameras are those of `generation.splats.cameras`: y up, the camera at azimuth 0 on +z, degrees.
Objects stand turned by `YAW`, and are framed as DreamGaussian frames its input: seen from the front at elevation
`FRONT_ELEVATION`, radius 2.5 and 49.1 degrees, the longer side of their outline fills `1 - BORDER` of the image.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace

import torch

from .captions import SIZES, ObjectSpec
from .shapes import (
    BOX,
    COLOURS,
    CUP,
    DOME,
    ELLIPSOID,
    MATERIALS,
    MAX_PRIMITIVES,
    PRISM,
    SHAPES,
    TORUS,
    Primitive,
    stack,
)

RADIUS = 2.5
FOVY = 49.1
FRONT_ELEVATION = 20.0
YAW = -30.0
BORDER = 0.2
_FAR = 1.9  # no object reaches further from the origin than this
_STEPS = 40
_LIGHT = (0.35, 0.80, 0.48)


@dataclass
class Objects:
    """A batch of B objects of P primitives each, as tensors."""

    kind: torch.Tensor  # (B, P) int64; -1 for none
    centre: torch.Tensor  # (B, P, 3)
    rotation: torch.Tensor  # (B, P, 3, 3) object -> primitive
    size: torch.Tensor  # (B, P, 4)
    colour: torch.Tensor  # (B, P, 3)
    stretch: torch.Tensor  # (B, 3)
    material: torch.Tensor  # (B,) index into MATERIALS
    scale: torch.Tensor  # (B,) world units per object unit
    offset: torch.Tensor  # (B, 3) world position of the object's origin

    def __getitem__(self, index) -> Objects:
        return Objects(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device) -> Objects:
        return Objects(*(getattr(self, f.name).to(device) for f in fields(self)))

    @staticmethod
    def cat(parts: list[Objects]) -> Objects:
        return Objects(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Objects)))

    def __len__(self) -> int:
        return self.kind.shape[0]


def _rotation(p: Primitive) -> list[list[float]]:
    a, b = math.radians(p.tilt), math.radians(p.turn)
    ca, sa, cb, sb = math.cos(a), math.sin(a), math.cos(b), math.sin(b)
    # inverse of (turn about z) @ (tilt about x)
    return [[cb, sb, 0.0], [-sb * ca, cb * ca, sa], [sb * sa, -cb * sa, ca]]


def build(specs: list[ObjectSpec], rng: random.Random, jitter: float = 0.04) -> Objects:
    """Tensors of `specs`, each with slightly different proportions and tints, framed (on the CPU)."""
    parts = []
    for spec in specs:
        tint = COLOURS[spec.colour]
        if spec.base:
            primitives = stack(spec.shape, spec.base, tint, COLOURS[spec.base_colour])
        else:
            primitives = SHAPES[spec.shape]()
        parts.append([replace(p, colour=p.colour or tint) for p in primitives])
    objects = assemble(parts, rng, jitter)
    for i, spec in enumerate(specs):
        objects.stretch[i] *= torch.tensor(SIZES.get(spec.size, (1.0, 1.0, 1.0)))
        objects.material[i] = MATERIALS.index(spec.material)
    return objects


def assemble(parts: list[list[Primitive]], rng: random.Random, jitter: float = 0.04) -> Objects:
    """Tensors of matte objects of coloured primitives, with slightly different proportions and tints."""
    b, p = len(parts), MAX_PRIMITIVES
    kind = torch.full((b, p), -1)
    centre, rotation = torch.zeros(b, p, 3), torch.eye(3).repeat(b, p, 1, 1)
    size, colour = torch.ones(b, p, 4), torch.zeros(b, p, 3)
    stretch, material = torch.ones(b, 3), torch.zeros(b, dtype=torch.long)
    for i, primitives in enumerate(parts):
        wobble = [rng.gauss(0, 0.5 * jitter) for _ in range(3)]
        for j, prim in enumerate(primitives):
            assert prim.colour is not None
            kind[i, j] = prim.kind
            centre[i, j] = torch.tensor(prim.centre)
            rotation[i, j] = torch.tensor(_rotation(prim))
            size[i, j] = torch.tensor(prim.size)
            tint = [min(max(c * (1 + w), 0.0), 1.0) for c, w in zip(prim.colour, wobble, strict=True)]
            colour[i, j] = torch.tensor(tint)
        stretch[i] = torch.tensor([1 + rng.uniform(-jitter, jitter) for _ in range(3)])
    return Objects(kind, centre, rotation, size, colour, stretch, material, torch.full((b,), 0.7), torch.zeros(b, 3))


def _frustum(rho, y, bottom, half, top):
    """Capped cone in its half plane: rho distance from the axis, y along it."""
    k1x, k1y = top, half
    k2x, k2y = top - bottom, 2 * half
    cax = rho - torch.minimum(rho, torch.where(y < 0, bottom, top))
    cay = y.abs() - half
    t = (((k1x - rho) * k2x + (k1y - y) * k2y) / (k2x * k2x + k2y * k2y)).clamp(0, 1)
    cbx, cby = rho - k1x + k2x * t, y - k1y + k2y * t
    inside = (cbx < 0) & (cay < 0)
    d = torch.minimum(cax * cax + cay * cay, cbx * cbx + cby * cby).clamp_min(1e-12).sqrt()
    return torch.where(inside, -d, d)


def _ellipsoid(x, y, z, rx, ry, rz):
    k0 = ((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2).clamp_min(1e-8).sqrt()
    k1 = ((x / rx**2) ** 2 + (y / ry**2) ** 2 + (z / rz**2) ** 2).clamp_min(1e-8).sqrt()
    return k0 * (k0 - 1) / k1


def _primitive(kind, x, y, z, a, b, c, e):
    """Signed distance of local points to one primitive; every kind is computed, `kind` selects."""
    qx, qy, qz = x.abs() - a + e, y.abs() - b + e, z.abs() - c + e
    outer = (qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2 + qz.clamp_min(0) ** 2).clamp_min(1e-12).sqrt()
    box = outer + torch.maximum(qx, torch.maximum(qy, qz)).clamp_max(0) - e
    rho = (x * x + z * z).clamp_min(1e-12).sqrt()
    sides = e.clamp_min(3)
    sector = 2 * math.pi / sides
    angle = torch.atan2(z, x)
    flat = rho * torch.cos(angle - sector * torch.round(angle / sector))
    axis = torch.where(kind == PRISM, flat, rho)
    frustum = _frustum(axis, y, a, b, c)
    hollow = _frustum(rho, y - 2 * e, (a - e).clamp_min(0.01), b + e, (c - e).clamp_min(0.01))
    ellipsoid = _ellipsoid(x, y, z, a, b, c)
    torus = ((rho - a) ** 2 + y * y).clamp_min(1e-12).sqrt() - b
    d = torch.where(kind == BOX, box, frustum)
    d = torch.where(kind == CUP, torch.maximum(frustum, -hollow), d)
    d = torch.where(kind == ELLIPSOID, ellipsoid, d)
    d = torch.where(kind == DOME, torch.maximum(ellipsoid, -y), d)
    d = torch.where(kind == TORUS, torus, d)
    return torch.where(kind < 0, torch.full_like(d, 1e3), d)


def _nearer(px, py, pz, rotation, centre, kind, size, index, best, nearest):
    """Fold one primitive of every object into the distance and index of the nearest so far."""
    r, c = rotation[:, None], centre[:, None]
    x, y, z = px - c[..., 0], py - c[..., 1], pz - c[..., 2]
    lx = r[..., 0, 0] * x + r[..., 0, 1] * y + r[..., 0, 2] * z
    ly = r[..., 1, 0] * x + r[..., 1, 1] * y + r[..., 1, 2] * z
    lz = r[..., 2, 0] * x + r[..., 2, 1] * y + r[..., 2, 2] * z
    d = _primitive(kind[:, None], lx, ly, lz, *(size[:, None, k] for k in range(4)))
    closer = d < best
    return torch.where(closer, d, best), torch.where(closer, index, nearest)


# On a GPU one fused kernel a primitive: small enough to compile in seconds, and bound by memory like the whole.
_nearer_fused = torch.compile(_nearer, dynamic=True)


def distance(points: torch.Tensor, objects: Objects) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower bound (B, R) of the distance of world points (B, R, 3) to each object, and its nearest primitive."""
    yaw = math.radians(YAW)
    cy, sy = math.cos(yaw), math.sin(yaw)
    p = (points - objects.offset[:, None]) / objects.scale[:, None, None]
    s = objects.stretch[:, None]
    px = (p[..., 0] * cy - p[..., 2] * sy) / s[..., 0]
    pz = (p[..., 0] * sy + p[..., 2] * cy) / s[..., 2]
    py = p[..., 1] / s[..., 1]
    best = torch.full_like(px, 1e3)
    nearest = torch.zeros_like(px, dtype=torch.int32)
    fold = _nearer_fused if points.is_cuda else _nearer
    indices = torch.arange(objects.kind.shape[1], dtype=torch.int32, device=points.device)
    parts = (t.unbind(1) for t in (objects.rotation, objects.centre, objects.kind, objects.size))
    for rotation, centre, kind, size, index in zip(*parts, indices, strict=True):
        best, nearest = fold(px, py, pz, rotation, centre, kind, size, index, best, nearest)
    return best * (objects.scale * objects.stretch.amin(1))[:, None], nearest.long()


def orbit(elevation: torch.Tensor, azimuth: torch.Tensor, radius: float | torch.Tensor = RADIUS) -> torch.Tensor:
    """Camera to world matrices (..., 4, 4), OpenGL axes, looking at the origin."""
    el, az = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    back = torch.stack([el.cos() * az.sin(), el.sin(), el.cos() * az.cos()], -1)
    right = torch.stack([az.cos(), torch.zeros_like(az), -az.sin()], -1)
    up = torch.linalg.cross(back, right)
    c2w = torch.zeros(*el.shape, 4, 4, device=el.device)
    position = back * torch.as_tensor(radius, device=el.device)[..., None]
    c2w[..., :3, 0], c2w[..., :3, 1], c2w[..., :3, 2], c2w[..., :3, 3] = right, up, back, position
    c2w[..., 3, 3] = 1
    return c2w


def _rays(c2w: torch.Tensor, size: int, fovy: float) -> torch.Tensor:
    """Unit ray directions (B, size * size, 3) through the pixel centres."""
    t = math.tan(math.radians(fovy) / 2)
    ticks = ((torch.arange(size, device=c2w.device) + 0.5) / size * 2 - 1) * t
    v, u = torch.meshgrid(-ticks, ticks, indexing="ij")
    local = torch.stack([u, v, -torch.ones_like(u)], -1).reshape(-1, 3)
    return torch.nn.functional.normalize(local @ c2w[:, :3, :3].transpose(1, 2), dim=-1)


def _advance(depth, far, origin, rays, objects: Objects):
    d, _ = distance(origin + rays * depth[..., None], objects)
    return torch.minimum(torch.where(d > 1e-3, depth + 0.9 * d, depth), far)


def _surface(origin, rays, objects: Objects):
    """March all rays together; hit points, unit normals, nearest primitives and hits, as `trace.march` gives them."""
    centre_depth = origin.norm(dim=-1)
    far = centre_depth + _FAR
    depth = (centre_depth - _FAR).expand(rays.shape[:2]).contiguous()
    for _ in range(_STEPS):
        depth = _advance(depth, far, origin, rays, objects)
    points = origin + rays * depth[..., None]
    d, nearest = distance(points, objects)
    h = 2e-3
    normal = torch.zeros_like(points)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        k = torch.tensor(corner, dtype=points.dtype, device=points.device)
        normal = normal + k * distance(points + h * k, objects)[0][..., None]
    return points, torch.nn.functional.normalize(normal, dim=-1), nearest, (d < 1e-2) & (depth < far - 1e-3)


def _traced(origin, rays, objects: Objects):
    from .trace import march  # numba, which a GPU has no use for

    names = ("kind", "centre", "rotation", "size", "stretch", "scale", "offset")
    arrays = [getattr(objects, name).numpy() for name in names]
    out = march(origin[:, 0].numpy(), rays.numpy(), _FAR, _STEPS, math.radians(YAW), *arrays)
    return [torch.from_numpy(x) for x in out]


def _shade(normal, nearest, rays, objects: Objects):
    light = torch.nn.functional.normalize(torch.tensor(_LIGHT, device=rays.device), dim=0)
    lambert = (normal * light).sum(-1).clamp_min(0)
    half = torch.nn.functional.normalize(light - rays, dim=-1)
    gleam = (normal * half).sum(-1).clamp_min(0)
    shiny, metallic = (objects.material[:, None] == k for k in (1, 2))
    diffuse = 0.72 + 0.12 * normal[..., 1] + 0.26 * lambert
    diffuse = torch.where(metallic, 0.62 + 0.22 * normal[..., 1] + 0.36 * lambert, diffuse)
    gloss = 0.5 * gleam**40 * shiny + 0.3 * gleam**10 * metallic
    albedo = torch.gather(objects.colour, 1, nearest[..., None].expand(-1, -1, 3))
    return (albedo * diffuse[..., None] + gloss[..., None]).clamp(0, 1)


class Renderer:
    """Renders on one device."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    @torch.no_grad()
    def render(self, objects: Objects, c2w: torch.Tensor, size: int, fovy: float = FOVY, supersample: int = 2):
        """Premultiplied RGBA (B, 4, size, size) in 0..1 of object i seen by camera i (`c2w` (B, 4, 4))."""
        fine = size * supersample
        rays = _rays(c2w, fine, fovy).contiguous()
        origin = c2w[:, None, :3, 3].contiguous()
        surface = _surface if rays.is_cuda else _traced
        _, normal, nearest, hit = surface(origin, rays, objects)
        rgb = _shade(normal, nearest, rays, objects)
        rgba = torch.cat([rgb, torch.ones_like(rgb[..., :1])], -1) * hit[..., None]
        rgba = rgba.reshape(len(objects), fine, fine, 4).permute(0, 3, 1, 2)
        return torch.nn.functional.avg_pool2d(rgba, supersample)

    @torch.no_grad()
    def frame(self, objects: Objects, rounds: int = 3, size: int = 64) -> Objects:
        """Scale and shift each object until its front view fills the frame (see the module's words)."""
        b = len(objects)
        c2w = orbit(torch.full((b,), FRONT_ELEVATION), torch.zeros(b)).to(self.device)
        world = 2 * RADIUS * math.tan(math.radians(FOVY) / 2)  # height of the image at the origin
        scale, offset = objects.scale.clone(), objects.offset.clone()
        ticks = torch.arange(size, device=self.device)
        for _ in range(rounds):
            now = Objects(
                **{f.name: getattr(objects, f.name) for f in fields(objects)} | {"scale": scale, "offset": offset}
            )
            mask = self.render(now, c2w, size, supersample=1)[:, 3] > 0.5
            box = []
            for line in (mask.any(1), mask.any(2)):  # columns, rows
                low = torch.where(line, ticks, size).amin(1)
                high = torch.where(line, ticks, -1).amax(1) + 1
                box.append((low, high))
            (left, right), (top, bottom) = box
            extent = torch.maximum(right - left, bottom - top).clamp_min(1) / size
            ratio = ((1 - BORDER) / extent).clamp(0.5, 2.0)
            du = ((left + right) / 2 / size - 0.5) * world
            dv = (0.5 - (top + bottom) / 2 / size) * world
            shift = du[:, None] * c2w[:, :3, 0] + dv[:, None] * c2w[:, :3, 1]
            offset = (offset - shift) * ratio[:, None]
            scale = scale * ratio
        return Objects(
            **{f.name: getattr(objects, f.name) for f in fields(objects)} | {"scale": scale, "offset": offset}
        )


def composite(rgba: torch.Tensor, background) -> torch.Tensor:
    """Premultiplied RGBA (..., 4, H, W) over a colour, grey level or image (..., 3, H, W)."""
    return rgba[..., :3, :, :] + (1 - rgba[..., 3:, :, :]) * background
