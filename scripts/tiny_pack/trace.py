"""The sphere tracer of `render.py` for CPUs: the same surfaces, one ray at a time, compiled by numba for all cores."""

from __future__ import annotations

import math

import numba
import numpy as np

from .shapes import BOX, CUP, DOME, ELLIPSOID, PRISM, TORUS


@numba.njit(cache=True, fastmath=True)
def _frustum(rho, y, bottom, half, top):
    cax = rho - min(rho, bottom if y < 0 else top)
    cay = abs(y) - half
    k2x, k2y = top - bottom, 2 * half
    t = min(max(((top - rho) * k2x + (half - y) * k2y) / (k2x * k2x + k2y * k2y), 0.0), 1.0)
    cbx, cby = rho - top + k2x * t, y - half + k2y * t
    d = math.sqrt(min(cax * cax + cay * cay, cbx * cbx + cby * cby))
    return -d if cbx < 0 and cay < 0 else d


@numba.njit(cache=True, fastmath=True)
def _ellipsoid(x, y, z, a, b, c):
    k0 = math.sqrt(max((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2, 1e-8))
    k1 = math.sqrt(max((x / (a * a)) ** 2 + (y / (b * b)) ** 2 + (z / (c * c)) ** 2, 1e-8))
    return k0 * (k0 - 1) / k1


@numba.njit(cache=True, fastmath=True)
def _primitive(kind, x, y, z, a, b, c, e):
    if kind == BOX:
        qx, qy, qz = abs(x) - a + e, abs(y) - b + e, abs(z) - c + e
        outer = math.sqrt(max(qx, 0.0) ** 2 + max(qy, 0.0) ** 2 + max(qz, 0.0) ** 2)
        return outer + min(max(qx, max(qy, qz)), 0.0) - e
    if kind == ELLIPSOID:
        return _ellipsoid(x, y, z, a, b, c)
    if kind == DOME:
        return max(_ellipsoid(x, y, z, a, b, c), -y)
    rho = math.sqrt(x * x + z * z)
    if kind == TORUS:
        return math.sqrt((rho - a) ** 2 + y * y) - b
    if kind == PRISM:
        sector = 2 * math.pi / e
        angle = math.atan2(z, x)
        rho = rho * math.cos(angle - sector * round(angle / sector))
    d = _frustum(rho, y, a, b, c)
    if kind == CUP:
        d = max(d, -_frustum(rho, y - 2 * e, max(a - e, 0.01), b + e, max(c - e, 0.01)))
    return d


@numba.njit(cache=True, fastmath=True)
def _distance(x, y, z, kind, centre, rotation, size, stretch, scale, offset, cy, sy):
    wx, wy, wz = (x - offset[0]) / scale, (y - offset[1]) / scale, (z - offset[2]) / scale
    px, py, pz = (wx * cy - wz * sy) / stretch[0], wy / stretch[1], (wx * sy + wz * cy) / stretch[2]
    best, nearest = 1e3, 0
    for j in range(kind.shape[0]):
        if kind[j] < 0:
            continue
        dx, dy, dz = px - centre[j, 0], py - centre[j, 1], pz - centre[j, 2]
        r = rotation[j]
        lx = r[0, 0] * dx + r[0, 1] * dy + r[0, 2] * dz
        ly = r[1, 0] * dx + r[1, 1] * dy + r[1, 2] * dz
        lz = r[2, 0] * dx + r[2, 1] * dy + r[2, 2] * dz
        d = _primitive(kind[j], lx, ly, lz, size[j, 0], size[j, 1], size[j, 2], size[j, 3])
        if d < best:
            best, nearest = d, j
    return best * scale * min(stretch[0], min(stretch[1], stretch[2])), nearest


@numba.njit(cache=True, fastmath=True, parallel=True)
def march(origins, rays, reach, steps, yaw, kind, centre, rotation, size, stretch, scale, offset):
    """Hit points (B, R, 3), normals (B, R, 3), nearest primitives (B, R) and hits (B, R) of `rays` (B, R, 3).

    `reach` is how far an object may extend from the origin; objects as in `render.Objects`, as arrays.
    """
    b, n = rays.shape[:2]
    points = np.zeros((b, n, 3), np.float32)
    normals = np.zeros((b, n, 3), np.float32)
    nearest = np.zeros((b, n), np.int64)
    hits = np.zeros((b, n), np.bool_)
    cy, sy = math.cos(yaw), math.sin(yaw)
    for flat in numba.prange(b * n):
        i, k = flat // n, flat % n
        ox, oy, oz = origins[i, 0], origins[i, 1], origins[i, 2]
        rx, ry, rz = rays[i, k, 0], rays[i, k, 1], rays[i, k, 2]
        middle = math.sqrt(ox * ox + oy * oy + oz * oz)
        depth, far, d, j = middle - reach, middle + reach, 1e3, 0
        o = (kind[i], centre[i], rotation[i], size[i], stretch[i], scale[i], offset[i], cy, sy)
        for _ in range(steps):
            d, j = _distance(ox + rx * depth, oy + ry * depth, oz + rz * depth, *o)
            if d <= 1e-3 or depth >= far:
                break
            depth += 0.9 * d
        if d >= 1e-2 or depth >= far:
            continue
        x, y, z = ox + rx * depth, oy + ry * depth, oz + rz * depth
        h = 2e-3
        nx = _distance(x + h, y, z, *o)[0] - _distance(x - h, y, z, *o)[0]
        ny = _distance(x, y + h, z, *o)[0] - _distance(x, y - h, z, *o)[0]
        nz = _distance(x, y, z + h, *o)[0] - _distance(x, y, z - h, *o)[0]
        length = max(math.sqrt(nx * nx + ny * ny + nz * nz), 1e-9)
        points[i, k, 0], points[i, k, 1], points[i, k, 2] = x, y, z
        normals[i, k, 0], normals[i, k, 1], normals[i, k, 2] = nx / length, ny / length, nz / length
        nearest[i, k] = j
        hits[i, k] = True
    return points, normals, nearest, hits
