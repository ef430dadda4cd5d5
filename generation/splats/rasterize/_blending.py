"""numba kernels: splats to pixels, and the gradients back.

The image is cut into tiles of TILE x TILE pixels. Each view's splats are sorted by depth and entered, in that order,
into the list of every tile that their box touches. A tile is blended front to back for all its pixels at once, lane by lane,
so that the compiler makes vector instructions of the inner loops.

Gradients of a splat come from several tiles. Each tile writes its part to the entry's own row, and the rows are summed per
splat afterwards: no atomics, and sums in the same order however many threads there are.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from generation.splats.rasterize._projection import ALPHA_MIN, HALF, ONE, OPTIONS, ZERO, f32

TILE = 8
LANES = TILE * TILE
ALPHA_MAX = f32(0.999)
TRANSMITTANCE_MIN = f32(1e-4)
PARTS = 9  # numbers in an entry's gradient: centre (2), inverse covariance (3), opacity, colour (3)

LOG2_E, LN_2 = f32(1.4426950408889634), f32(0.6931471805599453)
P2, P3, P4, P5, P6 = f32(1 / 2), f32(1 / 6), f32(1 / 24), f32(1 / 120), f32(1 / 720)


@njit(**OPTIONS, inline="always")
def _exp_negative(s):
    """exp(-s) for 0 <= s <= 80, relative error under 1e-6, without calls so that loops of it become vector code."""
    t = s * LOG2_E
    n = np.int32(t + HALF)
    f = (f32(n) - t) * LN_2  # within +-ln(2)/2
    e = ONE + f * (ONE + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
    return e * np.int32((np.int32(127) - n) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def sort_and_count(start, stop, depths, boxes, order, drawn, entries):
    """For the views `start` to `stop`: indices of the drawn splats by depth, their number, and that of their tiles."""
    n = depths.shape[1]
    other = np.empty(n, np.int32)
    digits = np.empty(2048, np.int32)
    for c in range(start, stop):
        keys = depths[c].view(np.int32)  # the bits of positive floats sort as integers do
        first = order[c]
        total = np.int64(0)
        m = 0
        for g in range(n):
            if boxes[c, g, 1] > boxes[c, g, 0]:
                first[m] = g
                m += 1
                wide = (boxes[c, g, 1] - 1) // TILE - boxes[c, g, 0] // TILE + 1
                high = (boxes[c, g, 3] - 1) // TILE - boxes[c, g, 2] // TILE + 1
                total += wide * high
        drawn[c], entries[c] = m, total
        src, dst = first, other
        for shift in (0, 11, 22):  # radix sort, stable: equal depths stay in the Gaussians' order
            digits[:] = 0
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
            first[i] = src[i]


@njit(**OPTIONS)
def fill_tiles(start, stop, boxes, order, drawn, view_start, wide, high, tile_start, entry_splat, entry_slot, slot_start):
    """For the views `start` to `stop`: each tile's splats front to back, as ranges of `entry_splat`.

    entry_slot: the row of the gradients' parts that an entry owns; a splat's rows follow one another from slot_start on.
    """
    n = order.shape[1]
    fill = np.empty(wide * high, np.int64)
    for c in range(start, stop):
        fill[:] = 0
        for i in range(drawn[c]):
            g = order[c, i]
            for ty in range(boxes[c, g, 2] // TILE, (boxes[c, g, 3] - 1) // TILE + 1):
                for tx in range(boxes[c, g, 0] // TILE, (boxes[c, g, 1] - 1) // TILE + 1):
                    fill[ty * wide + tx] += 1
        at = view_start[c]
        for t in range(wide * high):
            tile_start[c * wide * high + t] = at
            count = fill[t]
            fill[t] = at
            at += count
        slot = view_start[c]
        for g in range(n):
            slot_start[c, g] = slot
            if boxes[c, g, 1] > boxes[c, g, 0]:
                across = (boxes[c, g, 1] - 1) // TILE - boxes[c, g, 0] // TILE + 1
                slot += across * ((boxes[c, g, 3] - 1) // TILE - boxes[c, g, 2] // TILE + 1)
        for i in range(drawn[c]):
            g = order[c, i]
            slot = slot_start[c, g]
            for ty in range(boxes[c, g, 2] // TILE, (boxes[c, g, 3] - 1) // TILE + 1):
                for tx in range(boxes[c, g, 0] // TILE, (boxes[c, g, 1] - 1) // TILE + 1):
                    t = ty * wide + tx
                    entry_splat[fill[t]] = g
                    entry_slot[fill[t]] = slot
                    fill[t] += 1
                    slot += 1


@njit(**OPTIONS)
def blend(start, stop, means2d, splats, boxes, tile_start, entry_splat, wide, high, background, rgb, alpha):
    """For the tiles `start` to `stop`, counted over all views: the finished pixels."""
    height, width = rgb.shape[1], rgb.shape[2]
    live = np.empty(LANES, np.float32)  # transmittance, 0 once the pixel is finished
    left = np.empty(LANES, np.float32)  # transmittance that the background gets
    red = np.empty(LANES, np.float32)
    green = np.empty(LANES, np.float32)
    blue = np.empty(LANES, np.float32)
    for t in range(start, stop):
        c = t // (wide * high)
        x0, y0 = (t % wide) * TILE, (t // wide % high) * TILE
        live[:] = ONE
        left[:] = ONE
        red[:] = ZERO
        green[:] = ZERO
        blue[:] = ZERO
        for e in range(tile_start[t], tile_start[t + 1]):
            g = entry_splat[e]
            px, py = means2d[c, g, 0] - f32(x0) - HALF, means2d[c, g, 1] - f32(y0) - HALF
            s = splats[c, g]
            p, q, r, o, cr, cg, cb = HALF * s[0], s[1], HALF * s[2], s[3], s[4], s[5], s[6]
            first, last = max(boxes[c, g, 2] - y0, 0) * TILE, min(boxes[c, g, 3] - y0, TILE) * TILE
            for i in range(first, last):
                dx, dy = px - f32(i % TILE), py - f32(i // TILE)
                sigma = p * dx * dx + q * dx * dy + r * dy * dy
                a = min(o * _exp_negative(min(max(sigma, ZERO), f32(80.0))), ALPHA_MAX)
                a = a if a >= ALPHA_MIN and sigma >= ZERO else ZERO
                trans = live[i]
                after = trans * (ONE - a)
                go = after > TRANSMITTANCE_MIN
                weight = a * trans if go else ZERO
                red[i] += weight * cr
                green[i] += weight * cg
                blue[i] += weight * cb
                live[i] = after if go else ZERO
                left[i] = after if go else left[i]
            if e % 16 == 0:
                most = ZERO
                for i in range(LANES):
                    most = max(most, live[i])
                if most == ZERO:
                    break
        for y in range(min(TILE, height - y0)):
            for x in range(min(TILE, width - x0)):
                i = y * TILE + x
                rgb[c, y0 + y, x0 + x, 0] = red[i] + left[i] * background[c, 0]
                rgb[c, y0 + y, x0 + x, 1] = green[i] + left[i] * background[c, 1]
                rgb[c, y0 + y, x0 + x, 2] = blue[i] + left[i] * background[c, 2]
                alpha[c, y0 + y, x0 + x, 0] = ONE - left[i]


@njit(**OPTIONS)
def blend_backward(
    start, stop, means2d, splats, boxes, tile_start, entry_splat, entry_slot, wide, high, rgb, alpha, v_rgb, v_alpha, parts
):
    """For the tiles `start` to `stop`: every entry's row of `parts`, front to back like `blend`.

    With C the finished colour and v = v_rgb, what splats behind the i-th add to the loss's slope is the scalar
    v.C - v_alpha T_final - (v.c_j w_j summed over j <= i), so no second, reversed pass is needed.
    """
    height, width = rgb.shape[1], rgb.shape[2]
    live = np.empty(LANES, np.float32)
    behind = np.empty(LANES, np.float32)
    vr = np.empty(LANES, np.float32)
    vg = np.empty(LANES, np.float32)
    vb = np.empty(LANES, np.float32)
    for t in range(start, stop):
        c = t // (wide * high)
        x0, y0 = (t % wide) * TILE, (t // wide % high) * TILE
        live[:] = ZERO
        behind[:] = ZERO
        vr[:] = ZERO
        vg[:] = ZERO
        vb[:] = ZERO
        for y in range(min(TILE, height - y0)):
            for x in range(min(TILE, width - x0)):
                i = y * TILE + x
                yy, xx = y0 + y, x0 + x
                live[i] = ONE
                vr[i], vg[i], vb[i] = v_rgb[c, yy, xx, 0], v_rgb[c, yy, xx, 1], v_rgb[c, yy, xx, 2]
                behind[i] = vr[i] * rgb[c, yy, xx, 0] + vg[i] * rgb[c, yy, xx, 1] + vb[i] * rgb[c, yy, xx, 2]
                behind[i] -= v_alpha[c, yy, xx, 0] * (ONE - alpha[c, yy, xx, 0])
        done = False
        for e in range(tile_start[t], tile_start[t + 1]):
            row = parts[entry_slot[e]]
            row[:] = ZERO
            if done:
                continue
            g = entry_splat[e]
            px, py = means2d[c, g, 0] - f32(x0) - HALF, means2d[c, g, 1] - f32(y0) - HALF
            s = splats[c, g]
            p, q, r, o, cr, cg, cb = HALF * s[0], s[1], HALF * s[2], s[3], s[4], s[5], s[6]
            first, last = max(boxes[c, g, 2] - y0, 0) * TILE, min(boxes[c, g, 3] - y0, TILE) * TILE
            # m..: moments of the slope by sigma over the pixels, from which all geometry gradients follow.
            m = mx = my = mxx = mxy = myy = sr = sg = sb = ZERO
            for i in range(first, last):
                dx, dy = px - f32(i % TILE), py - f32(i // TILE)
                sigma = p * dx * dx + q * dx * dy + r * dy * dy
                full = o * _exp_negative(min(max(sigma, ZERO), f32(80.0)))
                a = min(full, ALPHA_MAX)
                a = a if a >= ALPHA_MIN and sigma >= ZERO else ZERO
                trans = live[i]
                after = trans * (ONE - a)
                go = after > TRANSMITTANCE_MIN
                weight = a * trans if go else ZERO
                live[i] = after if go else ZERO
                shade = vr[i] * cr + vg[i] * cg + vb[i] * cb
                rest = behind[i] - weight * shade
                behind[i] = rest
                slope = trans * shade - rest / (ONE - a)
                slope = -a * slope if go and full <= ALPHA_MAX else ZERO
                sr += weight * vr[i]
                sg += weight * vg[i]
                sb += weight * vb[i]
                m += slope
                mx += slope * dx
                my += slope * dy
                mxx += slope * dx * dx
                mxy += slope * dx * dy
                myy += slope * dy * dy
            row[0], row[1] = s[0] * mx + q * my, q * mx + s[2] * my
            row[2], row[3], row[4] = HALF * mxx, mxy, HALF * myy
            row[5] = -m / o
            row[6], row[7], row[8] = sr, sg, sb
            if e % 16 == 0:
                most = ZERO
                for i in range(LANES):
                    most = max(most, live[i])
                done = most == ZERO


@njit(**OPTIONS)
def sum_parts(start, stop, parts, slot_start, boxes, v_means2d, v_splats):
    """For the splats `start` to `stop` of all views in one row: the sum over the tiles that they touch."""
    n = slot_start.shape[1]
    for i in range(start, stop):
        c, g = i // n, i % n
        v_means2d[c, g, 0] = v_means2d[c, g, 1] = ZERO
        for j in range(7):
            v_splats[c, g, j] = ZERO
        if boxes[c, g, 1] > boxes[c, g, 0]:
            across = (boxes[c, g, 1] - 1) // TILE - boxes[c, g, 0] // TILE + 1
            count = across * ((boxes[c, g, 3] - 1) // TILE - boxes[c, g, 2] // TILE + 1)
            for slot in range(slot_start[c, g], slot_start[c, g] + count):
                v_means2d[c, g, 0] += parts[slot, 0]
                v_means2d[c, g, 1] += parts[slot, 1]
                for j in range(7):
                    v_splats[c, g, j] += parts[slot, 2 + j]
