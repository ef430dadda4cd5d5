"""numba kernels: splats to pixels, forward and backward.

The image is cut into tiles of TILE x TILE pixels. Each view's splats are sorted by depth and entered, in that order,
into the list of every tile that their ellipse touches. A tile is blended front to back for all its pixels at once, lane
by lane, so that the compiler makes vector instructions of the inner loops.

Gradients of a splat come from several tiles. Each tile writes its part to the entry's own row, and the rows are summed
per splat afterwards: no atomics, and sums in the same order however many threads there are.
"""

# mypy: ignore-errors
# (numba's types, not Python's)

from __future__ import annotations

import math

import numpy as np

from generation.splats.rasterize._projection import (
    ALPHA_MIN,
    BLUE,
    CXX,
    CXY,
    CYY,
    GREEN,
    HALF,
    ONE,
    OPACITY,
    PX,
    PY,
    REACH2,
    RED,
    RX,
    RY,
    SPLAT,
    ZERO,
    f32,
    kernel,
)

SHIFT = 3
TILE = 1 << SHIFT
LANES = TILE * TILE
ALPHA_MAX = f32(0.999)
ROUNDING = f32(0.01)  # pixels that float32 may be off by
TRANSMITTANCE_MIN = f32(1e-4)
NEAR = 64  # splats copied at once
PARTS = 9  # numbers in an entry's gradient: centre (2), inverse covariance (3), opacity, colour (3)

SIGMA_MAX = f32(5.6)  # just above ln 255: from here on even an opacity of 1 gives an alpha under ALPHA_MIN
E0, E1, E2 = f32(0.9999999205183207), f32(-0.12499906742655556), f32(0.007810665434812848)
E3, E4, E5 = f32(-0.000324167922178077), f32(9.710098074304346e-06), f32(-1.7842894340568624e-07)


@kernel
def _exp_negative(s):
    """exp(-s) for 0 <= s <= SIGMA_MAX as exp(-s/8)^8, a polynomial: relative error under 3e-6, and vector code."""
    e = E0 + s * (E1 + s * (E2 + s * (E3 + s * (E4 + s * E5))))
    e *= e
    e *= e
    return e * e


@kernel
def _pixels(centre, reach, size):
    """First and one past the last pixel whose middle is within `reach` of `centre`."""
    first = math.ceil(min(max(centre - reach - ROUNDING - HALF, ZERO), size))
    stop = math.floor(min(max(centre + reach + ROUNDING + HALF, ZERO), size))
    return first, max(stop, first)


@kernel
def sort_and_count(start, stop, width, height, splats, depths, order, drawn, bounds):
    """For the views `start` to `stop`: the drawn splats by depth, their number, a bound on the number of entries."""
    n = depths.shape[1]
    other = np.empty(n, np.int32)
    digits = np.empty(2048, np.int32)
    for c in range(start, stop):
        keys = depths[c].view(np.int32)  # the bits of positive floats sort as integers do
        src, dst = order[c], other
        total = 0
        m = 0
        for g in range(n):
            s = splats[c, g]
            if s[RX] > ZERO:
                x0, x1 = _pixels(s[PX], s[RX], width)
                y0, y1 = _pixels(s[PY], s[RY], height)
                if x0 < x1 and y0 < y1:
                    src[m] = g
                    m += 1
                    total += (((x1 - 1) >> SHIFT) - (x0 >> SHIFT) + 1) * (((y1 - 1) >> SHIFT) - (y0 >> SHIFT) + 1)
        drawn[c], bounds[c] = m, total
        for shift in (0, 11, 22):  # radix sort, stable: equal depths stay in the Gaussians' order
            for d in range(2048):
                digits[d] = 0
            for i in range(m):
                digits[(keys[src[i]] >> shift) & 2047] += 1
            at = 0
            for d in range(2048):
                count = digits[d]
                digits[d] = at
                at += count
            for i in range(m):
                d = (keys[src[i]] >> shift) & 2047
                dst[digits[d]] = src[i]
                digits[d] += 1
            src, dst = dst, src
        for i in range(m):
            order[c, i] = src[i]


@kernel
def fill_tiles(
    start, stop, width, height, splats, order, drawn, view_start, wide, high, tile_ranges, entries, slot_start
):
    """For the views `start` to `stop`: the tiles' lists, front to back.

    tile_ranges: (C * tiles, 2) first and one past the last of each tile's rows in `entries`.
    entries: (M, 3) splat, its rows of pixels in the tile as 16 * first + last, the row of `parts` that the entry owns.
    slot_start: (C, N + 1) first row of `parts` of each splat of `order`; they follow one another.
    """
    tiles = wide * high
    fill = np.empty(tiles, np.int64)
    near = np.empty((NEAR, SPLAT), np.float32)
    for c in range(start, stop):
        base = view_start[c]
        found = np.empty((view_start[c + 1] - base, 2), np.int32)  # tile and rows of pixels, splat after splat
        for t in range(tiles):
            fill[t] = 0
        m = 0
        for i in range(drawn[c]):
            if i % NEAR == 0:  # a loop of nothing but copies waits for many cache lines at once
                for j in range(min(NEAR, drawn[c] - i)):
                    g = order[c, i + j]
                    for k in range(SPLAT):
                        near[j, k] = splats[c, g, k]
            slot_start[c, i] = base + m
            s = near[i % NEAR]
            px, py, rx, ry = s[PX], s[PY], s[RX], s[RY]
            # The ellipse's upper and lower edge at x: tilt * x +- bulge * sqrt(rx^2 - x^2); its top is at `top`.
            tilt, bulge, top = -s[CXY] / s[CYY], math.sqrt(s[REACH2] / s[CYY]) / rx, -s[CXY] / s[CXX] * ry
            x0, x1 = _pixels(px, rx, width)
            for tx in range(x0 >> SHIFT, ((x1 - 1) >> SHIFT) + 1):
                left = max(f32(tx * TILE) + HALF - px, -rx)
                right = min(f32(tx * TILE + TILE) - HALF - px, rx)
                x = min(max(top, left), right)
                upper = tilt * x + bulge * math.sqrt(max(rx * rx - x * x, ZERO))
                x = min(max(-top, left), right)
                lower = tilt * x - bulge * math.sqrt(max(rx * rx - x * x, ZERO))
                y0, y1 = _pixels(py + HALF * (upper + lower), HALF * (upper - lower), height)
                for ty in range(y0 >> SHIFT, ((y1 - 1) >> SHIFT) + 1 if y1 > y0 else 0):
                    found[m, 0] = ty * wide + tx
                    found[m, 1] = 16 * max(y0 - ty * TILE, 0) + min(y1 - ty * TILE, TILE)
                    fill[ty * wide + tx] += 1
                    m += 1
        slot_start[c, drawn[c]] = base + m
        at = base
        for t in range(tiles):
            tile_ranges[c * tiles + t, 0] = at
            count = fill[t]
            fill[t] = at
            at += count
            tile_ranges[c * tiles + t, 1] = at
        for i in range(drawn[c]):
            for slot in range(slot_start[c, i], slot_start[c, i + 1]):
                t = found[slot - base, 0]
                at = fill[t]
                fill[t] = at + 1
                entries[at, 0], entries[at, 1], entries[at, 2] = order[c, i], found[slot - base, 1], slot


# Per-pixel state of a tile is one flat array, LANES numbers for each of these. Offsets that are constants, and unsigned
# indices (Python's negative ones need a branch), are what lets LLVM see that the loops can be vector code.
TRANS = np.uintp(0)  # transmittance, negative once the pixel is finished
X, Y = np.uintp(LANES), np.uintp(2 * LANES)  # the pixel's place in the tile
R, G, B = np.uintp(3 * LANES), np.uintp(4 * LANES), np.uintp(5 * LANES)  # colour so far; going back, v_rgb
BEHIND = np.uintp(6 * LANES)  # going back: what is behind the splats so far
STATE = 7 * LANES


@kernel
def _new_lanes():
    lanes = np.empty(STATE, np.float32)
    for i in range(LANES):
        lanes[X + np.uintp(i)], lanes[Y + np.uintp(i)] = f32(i % TILE), f32(i // TILE)
    return lanes


@kernel
def _clear(lanes):
    for i in range(np.uintp(LANES)):
        lanes[TRANS + i] = lanes[R + i] = lanes[G + i] = lanes[B + i] = lanes[BEHIND + i] = ZERO


@kernel
def _finished(lanes):
    most = -ONE
    for i in range(np.uintp(LANES)):
        most = max(most, lanes[TRANS + i])
    return most <= ZERO


@kernel
def blend(start, stop, splats, tile_ranges, entries, wide, high, background, rgb, alpha):
    """For the tiles `start` to `stop`, counted over all views: the finished pixels."""
    height, width = rgb.shape[1], rgb.shape[2]
    lanes = _new_lanes()
    for t in range(start, stop):
        c = t // (wide * high)
        x0, y0 = (t % wide) * TILE, (t // wide % high) * TILE
        across, down = min(TILE, width - x0), min(TILE, height - y0)
        _clear(lanes)
        for y in range(down):
            for x in range(across):
                lanes[TRANS + np.uintp(y * TILE + x)] = ONE
        for e in range(tile_ranges[t, 0], tile_ranges[t, 1]):
            g = entries[e, 0]
            s = splats[c, g]
            px, py = s[PX] - f32(x0) - HALF, s[PY] - f32(y0) - HALF
            p, q, r, o, cr, cg, cb = HALF * s[CXX], s[CXY], HALF * s[CYY], s[OPACITY], s[RED], s[GREEN], s[BLUE]
            first, last = (entries[e, 1] >> 4) * TILE, (entries[e, 1] & 15) * TILE
            for i in range(np.uintp(first), np.uintp(last)):
                dx, dy = px - lanes[X + i], py - lanes[Y + i]
                sigma = p * dx * dx + q * dx * dy + r * dy * dy
                a = min(o * _exp_negative(min(sigma, SIGMA_MAX)), ALPHA_MAX)
                a = a if a >= ALPHA_MIN and sigma >= ZERO else ZERO
                trans = lanes[TRANS + i]
                after = trans * (ONE - a)
                go = after > TRANSMITTANCE_MIN
                weight = a * trans if go else ZERO
                lanes[TRANS + i] = after if go else -abs(trans)
                lanes[R + i] += weight * cr
                lanes[G + i] += weight * cg
                lanes[B + i] += weight * cb
            if e % 8 == 0 and _finished(lanes):
                break
        for y in range(down):
            for x in range(across):
                i = np.uintp(y * TILE + x)
                left = abs(lanes[TRANS + i])
                rgb[c, y0 + y, x0 + x, 0] = lanes[R + i] + left * background[c, 0]
                rgb[c, y0 + y, x0 + x, 1] = lanes[G + i] + left * background[c, 1]
                rgb[c, y0 + y, x0 + x, 2] = lanes[B + i] + left * background[c, 2]
                alpha[c, y0 + y, x0 + x, 0] = ONE - left


@kernel
def blend_backward(
    start, stop, splats, tile_ranges, entries, wide, high, rgb, alpha, v_rgb, v_alpha, parts
):  # fmt: skip
    """For the tiles `start` to `stop`: every entry's row of `parts`, front to back like `blend`.

    With C the finished colour and v = v_rgb, what splats behind the i-th add to the loss's slope is the scalar
    v.C - v_alpha T_final - (v.c_j w_j summed over j <= i), so no second, reversed pass is needed.
    """
    height, width = rgb.shape[1], rgb.shape[2]
    lanes = _new_lanes()
    for t in range(start, stop):
        c = t // (wide * high)
        x0, y0 = (t % wide) * TILE, (t // wide % high) * TILE
        _clear(lanes)
        for y in range(min(TILE, height - y0)):
            for x in range(min(TILE, width - x0)):
                i = np.uintp(y * TILE + x)
                vr, vg, vb = v_rgb[c, y0 + y, x0 + x, 0], v_rgb[c, y0 + y, x0 + x, 1], v_rgb[c, y0 + y, x0 + x, 2]
                rest = vr * rgb[c, y0 + y, x0 + x, 0] + vg * rgb[c, y0 + y, x0 + x, 1] + vb * rgb[c, y0 + y, x0 + x, 2]
                lanes[TRANS + i] = ONE
                lanes[BEHIND + i] = rest - v_alpha[c, y0 + y, x0 + x, 0] * (ONE - alpha[c, y0 + y, x0 + x, 0])
                lanes[R + i], lanes[G + i], lanes[B + i] = vr, vg, vb
        done = False
        for e in range(tile_ranges[t, 0], tile_ranges[t, 1]):
            row = parts[entries[e, 2]]
            if done:
                for k in range(PARTS):
                    row[k] = ZERO
                continue
            g = entries[e, 0]
            s = splats[c, g]
            px, py = s[PX] - f32(x0) - HALF, s[PY] - f32(y0) - HALF
            p, q, r, o, cr, cg, cb = HALF * s[CXX], s[CXY], HALF * s[CYY], s[OPACITY], s[RED], s[GREEN], s[BLUE]
            first, last = (entries[e, 1] >> 4) * TILE, (entries[e, 1] & 15) * TILE
            # m..: moments of the slope by sigma over the pixels, from which all geometry gradients follow.
            m = mx = my = mxx = mxy = myy = sr = sg = sb = ZERO
            for i in range(np.uintp(first), np.uintp(last)):
                dx, dy = px - lanes[X + i], py - lanes[Y + i]
                sigma = p * dx * dx + q * dx * dy + r * dy * dy
                full = o * _exp_negative(min(sigma, SIGMA_MAX))
                a = min(full, ALPHA_MAX)
                a = a if a >= ALPHA_MIN and sigma >= ZERO else ZERO
                trans = lanes[TRANS + i]
                after = trans * (ONE - a)
                go = after > TRANSMITTANCE_MIN
                weight = a * trans if go else ZERO
                lanes[TRANS + i] = after if go else -abs(trans)
                vr, vg, vb = lanes[R + i], lanes[G + i], lanes[B + i]
                shade = vr * cr + vg * cg + vb * cb
                rest = lanes[BEHIND + i] - weight * shade
                lanes[BEHIND + i] = rest
                slope = a * (rest / (ONE - a) - trans * shade)
                slope = slope if go and full <= ALPHA_MAX else ZERO
                sr += weight * vr
                sg += weight * vg
                sb += weight * vb
                m += slope
                mx += slope * dx
                my += slope * dy
                mxx += slope * dx * dx
                mxy += slope * dx * dy
                myy += slope * dy * dy
            row[0], row[1] = s[CXX] * mx + q * my, q * mx + s[CYY] * my
            row[2], row[3], row[4] = HALF * mxx, mxy, HALF * myy
            row[5] = -m / o
            row[6], row[7], row[8] = sr, sg, sb
            if e % 8 == 0:
                done = _finished(lanes)


@kernel
def sum_parts(start, stop, parts, order, drawn, slot_start, v_means2d, v_splats):
    """For the splats `start` to `stop` of every view's `order`: the sum over the tiles that they touch."""
    for c in range(len(drawn)):
        for i in range(start, min(stop, drawn[c])):
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = ZERO
            for slot in range(slot_start[c, i], slot_start[c, i + 1]):
                s0 += parts[slot, 0]
                s1 += parts[slot, 1]
                s2 += parts[slot, 2]
                s3 += parts[slot, 3]
                s4 += parts[slot, 4]
                s5 += parts[slot, 5]
                s6 += parts[slot, 6]
                s7 += parts[slot, 7]
                s8 += parts[slot, 8]
            g = order[c, i]
            v = v_splats[c, g]
            v_means2d[c, g, 0], v_means2d[c, g, 1] = s0, s1
            v[CXX], v[CXY], v[CYY], v[OPACITY], v[RED], v[GREEN], v[BLUE] = s2, s3, s4, s5, s6, s7, s8
