"""numba kernels: 3D Gaussians to screen splats, forward and backward.

Every kernel works on the Gaussians `start` to `stop`, for all views, and writes to rows of these alone: ranges may run
in parallel, and the result does not depend on how they are cut. All floats are float32, constants too, so that nothing
is promoted to float64.

numba keeps compiled code beside the sources and renews a file's when that file changes: after changing a constant here,
touch the files that import it.

A splat is one cache line of `splats`, whose columns are named below.
Splatting follows Zwicker et al. 2001, "EWA volume splatting"; harmonics have the signs and constants of 3DGS.
"""

# mypy: ignore-errors
# (numba's types, not Python's)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

f32 = np.float32

# Columns of `splats`: inverse covariance, opacity and colour, which have gradients; then, for the way from there to
# pixels, the centre, half the width and height of the ellipse outside of which alpha is under 1/255 (0 = not drawn) and
# the square of that ellipse's Mahalanobis radius.
CXX, CXY, CYY, OPACITY, RED, GREEN, BLUE, PX, PY, RX, RY, REACH2 = range(12)
SPLAT = 16

NEAR_PLANE = f32(0.01)
BLUR = f32(0.3)  # pixels^2, added to the projected covariance's diagonal
ALPHA_MIN = f32(1.0 / 255.0)
FRUSTUM_MARGIN = f32(0.3)  # the projection's slope is taken at most this far outside the image, in half image sizes
MAX_RADIUS = f32(1e6)  # pixels, within an int32 and beyond any image

ZERO, ONE, TWO, HALF = f32(0.0), f32(1.0), f32(2.0), f32(0.5)
SH0 = f32(0.28209479177387814)
SH1 = f32(0.4886025119029199)
SH2A, SH2B, SH2C = f32(1.0925484305920792), f32(0.31539156525252005), f32(0.5462742152960396)
SH3A, SH3B, SH3C = f32(0.5900435899266435), f32(2.890611442640554), f32(0.4570457994644658)
SH3D, SH3E = f32(0.3731763325901154), f32(1.445305721320277)
THREE, FOUR, SIX, EIGHT = f32(3.0), f32(4.0), f32(6.0), f32(8.0)

# Not "nnan" and "ninf": values that are not finite must fail the comparisons that cull.
kernel: Any = njit(cache=True, nogil=True, fastmath={"contract", "arcp", "nsz", "reassoc"}, error_model="numpy")


@kernel
def _rotation(w, x, y, z):
    """Matrix of a unit quaternion, by rows."""
    return (
        ONE - TWO * (y * y + z * z), TWO * (x * y - w * z), TWO * (x * z + w * y),
        TWO * (x * y + w * z), ONE - TWO * (x * x + z * z), TWO * (y * z - w * x),
        TWO * (x * z - w * y), TWO * (y * z + w * x), ONE - TWO * (x * x + y * y),
    )  # fmt: skip


@kernel
def _covariance(r00, r01, r02, r10, r11, r12, r20, r21, r22, sx, sy, sz):
    """R diag(sx, sy, sz) R^T, the upper triangle."""
    return (
        r00 * r00 * sx + r01 * r01 * sy + r02 * r02 * sz,
        r00 * r10 * sx + r01 * r11 * sy + r02 * r12 * sz,
        r00 * r20 * sx + r01 * r21 * sy + r02 * r22 * sz,
        r10 * r10 * sx + r11 * r11 * sy + r12 * r12 * sz,
        r10 * r20 * sx + r11 * r21 * sy + r12 * r22 * sz,
        r20 * r20 * sx + r21 * r21 * sy + r22 * r22 * sz,
    )


@kernel
def _symmetric_times(m00, m01, m02, m11, m12, m22, x, y, z):
    """A symmetric matrix, by its upper triangle, times a vector."""
    return m00 * x + m01 * y + m02 * z, m01 * x + m11 * y + m12 * z, m02 * x + m12 * y + m22 * z


@kernel
def _in_frustum(slope, focal, centre, size):
    """The slope x/z or y/z, limited to little outside the image, where the projection's linearisation would blow up."""
    margin = FRUSTUM_MARGIN * HALF * size
    return min(max(slope, (-centre - margin) / focal), (size - centre + margin) / focal)


@kernel
def _basis(k, x, y, z, b):
    """The first k basis functions in the unit direction (x, y, z)."""
    b[0] = SH0
    if k > 1:
        b[1], b[2], b[3] = -SH1 * y, SH1 * z, -SH1 * x
    if k > 4:
        b[4], b[5], b[7] = SH2A * x * y, -SH2A * y * z, -SH2A * x * z
        b[6] = SH2B * (TWO * z * z - x * x - y * y)
        b[8] = SH2C * (x * x - y * y)
    if k > 9:
        xx, yy, zz = x * x, y * y, z * z
        b[9] = -SH3A * y * (THREE * xx - yy)
        b[10] = SH3B * x * y * z
        b[11] = -SH3C * y * (FOUR * zz - xx - yy)
        b[12] = SH3D * z * (TWO * zz - THREE * xx - THREE * yy)
        b[13] = -SH3C * x * (FOUR * zz - xx - yy)
        b[14] = SH3E * z * (xx - yy)
        b[15] = -SH3A * x * (xx - THREE * yy)


@kernel
def _basis_gradient(k, x, y, z, v):
    """Gradient by x, y, z of sum(v[i] * basis i), the basis taken as polynomials of three free variables."""
    gx, gy, gz = -SH1 * v[3], -SH1 * v[1], SH1 * v[2]
    if k > 4:
        gx += SH2A * (y * v[4] - z * v[7]) - TWO * SH2B * x * v[6] + TWO * SH2C * x * v[8]
        gy += SH2A * (x * v[4] - z * v[5]) - TWO * SH2B * y * v[6] - TWO * SH2C * y * v[8]
        gz += -SH2A * (y * v[5] + x * v[7]) + FOUR * SH2B * z * v[6]
    if k > 9:
        xx, yy, zz = x * x, y * y, z * z
        xy, xz, yz = x * y, x * z, y * z
        gx += -SH3A * SIX * xy * v[9] + SH3B * yz * v[10] + SH3C * TWO * xy * v[11] - SH3D * SIX * xz * v[12]
        gx += -SH3C * (FOUR * zz - THREE * xx - yy) * v[13] + SH3E * TWO * xz * v[14] - SH3A * THREE * (xx - yy) * v[15]
        gy += -SH3A * THREE * (xx - yy) * v[9] + SH3B * xz * v[10] - SH3C * (FOUR * zz - xx - THREE * yy) * v[11]
        gy += -SH3D * SIX * yz * v[12] + SH3C * TWO * xy * v[13] - SH3E * TWO * yz * v[14] + SH3A * SIX * xy * v[15]
        gz += SH3B * xy * v[10] - SH3C * EIGHT * yz * v[11] + SH3D * (SIX * zz - THREE * (xx + yy)) * v[12]
        gz += -SH3C * EIGHT * xz * v[13] + SH3E * (xx - yy) * v[14]
    return gx, gy, gz


@kernel
def project(
    start, stop, means, quats, log_scales, logit_opacities, sh, viewmats, Ks, centres, width, height,
    means2d, splats, depths, radii,
):  # fmt: skip
    """Fill the four outputs."""
    views, k = viewmats.shape[0], sh.shape[1]
    b = np.empty(16, np.float32)
    for g in range(start, stop):
        mx, my, mz = means[g, 0], means[g, 1], means[g, 2]
        qw, qx, qy, qz = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
        inv = ONE / math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(qw * inv, qx * inv, qy * inv, qz * inv)
        sx, sy, sz = (
            math.exp(TWO * log_scales[g, 0]),
            math.exp(TWO * log_scales[g, 1]),
            math.exp(TWO * log_scales[g, 2]),
        )
        c00, c01, c02, c11, c12, c22 = _covariance(r00, r01, r02, r10, r11, r12, r20, r21, r22, sx, sy, sz)
        opacity = ONE / (ONE + math.exp(-logit_opacities[g]))
        reach2 = TWO * math.log(opacity / ALPHA_MIN)  # squared, in standard deviations, up to where alpha is 1/255

        for c in range(views):
            V = viewmats[c]
            fx, fy, cx, cy = Ks[c, 0, 0], Ks[c, 1, 1], Ks[c, 0, 2], Ks[c, 1, 2]
            radii[c, g] = 0
            s = splats[c, g]
            s[RX] = s[RY] = ZERO
            z = V[2, 0] * mx + V[2, 1] * my + V[2, 2] * mz + V[2, 3]
            depths[c, g] = z
            means2d[c, g, 0] = means2d[c, g, 1] = ZERO
            if not (z >= NEAR_PLANE and reach2 >= ZERO):
                continue
            x = V[0, 0] * mx + V[0, 1] * my + V[0, 2] * mz + V[0, 3]
            y = V[1, 0] * mx + V[1, 1] * my + V[1, 2] * mz + V[1, 3]
            rz = ONE / z
            u, v = x * rz, y * rz
            px, py = fx * u + cx, fy * v + cy
            uc, vc = _in_frustum(u, fx, cx, width), _in_frustum(v, fy, cy, height)
            # T = J W, the projection's slope times the camera's rotation.
            ax, bx, ay, by = fx * rz, -fx * rz * uc, fy * rz, -fy * rz * vc
            t00, t01, t02 = ax * V[0, 0] + bx * V[2, 0], ax * V[0, 1] + bx * V[2, 1], ax * V[0, 2] + bx * V[2, 2]
            t10, t11, t12 = ay * V[1, 0] + by * V[2, 0], ay * V[1, 1] + by * V[2, 1], ay * V[1, 2] + by * V[2, 2]
            h0, h1, h2 = _symmetric_times(c00, c01, c02, c11, c12, c22, t00, t01, t02)
            vxx = h0 * t00 + h1 * t01 + h2 * t02 + BLUR
            vxy = h0 * t10 + h1 * t11 + h2 * t12
            h0, h1, h2 = _symmetric_times(c00, c01, c02, c11, c12, c22, t10, t11, t12)
            vyy = h0 * t10 + h1 * t11 + h2 * t12 + BLUR
            det = vxx * vyy - vxy * vxy
            rx, ry = min(math.sqrt(reach2 * vxx), MAX_RADIUS), min(math.sqrt(reach2 * vyy), MAX_RADIUS)
            # Written so that NaN fails; a covariance beyond float32 is not drawn either.
            if not (det > ZERO and det < np.inf and px + rx > ZERO and px - rx < width):
                continue
            if not (py + ry > ZERO and py - ry < height):
                continue
            inv = ONE / det
            s[CXX], s[CXY], s[CYY], s[OPACITY] = vyy * inv, -vxy * inv, vxx * inv, opacity

            if k > 1:
                x, y, z = mx - centres[c, 0], my - centres[c, 1], mz - centres[c, 2]
                inv = ONE / math.sqrt(x * x + y * y + z * z)
                _basis(k, x * inv, y * inv, z * inv, b)
            else:
                b[0] = SH0
            red = green = blue = HALF
            for i in range(k):
                red += b[i] * sh[g, i, 0]
                green += b[i] * sh[g, i, 1]
                blue += b[i] * sh[g, i, 2]
            if not abs(red) + abs(green) + abs(blue) < np.inf:
                continue
            s[RED], s[GREEN], s[BLUE] = max(red, ZERO), max(green, ZERO), max(blue, ZERO)
            s[PX], s[PY], s[RX], s[RY], s[REACH2] = px, py, rx, ry, reach2
            means2d[c, g, 0], means2d[c, g, 1] = px, py
            radii[c, g] = math.ceil(max(rx, ry, ONE))


@kernel
def project_backward(
    start, stop, means, quats, log_scales, logit_opacities, sh, viewmats, Ks, centres, width, height,
    splats, radii, v_means2d, v_splats, v_means, v_quats, v_log_scales, v_logit_opacities, v_sh,
):  # fmt: skip
    """Gradients of the Gaussians' fields from those of the splats; v_x stands for the loss's derivative by x."""
    views, k = viewmats.shape[0], sh.shape[1]
    b = np.empty(16, np.float32)
    w = np.empty(16, np.float32)
    for g in range(start, stop):
        for i in range(k):
            v_sh[g, i, 0] = v_sh[g, i, 1] = v_sh[g, i, 2] = ZERO
        mx, my, mz = means[g, 0], means[g, 1], means[g, 2]
        qw, qx, qy, qz = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
        qinv = ONE / math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        qw, qx, qy, qz = qw * qinv, qx * qinv, qy * qinv, qz * qinv
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(qw, qx, qy, qz)
        sx, sy, sz = (
            math.exp(TWO * log_scales[g, 0]),
            math.exp(TWO * log_scales[g, 1]),
            math.exp(TWO * log_scales[g, 2]),
        )
        c00, c01, c02, c11, c12, c22 = _covariance(r00, r01, r02, r10, r11, r12, r20, r21, r22, sx, sy, sz)
        vmx = vmy = vmz = vop = ZERO
        # v_cov, symmetric: off the diagonal the derivative of each of the two equal entries.
        e00 = e01 = e02 = e11 = e12 = e22 = ZERO
        seen = False

        for c in range(views):
            if radii[c, g] == 0:
                continue
            seen = True
            V = viewmats[c]
            fx, fy, cx, cy = Ks[c, 0, 0], Ks[c, 1, 1], Ks[c, 0, 2], Ks[c, 1, 2]
            x = V[0, 0] * mx + V[0, 1] * my + V[0, 2] * mz + V[0, 3]
            y = V[1, 0] * mx + V[1, 1] * my + V[1, 2] * mz + V[1, 3]
            z = V[2, 0] * mx + V[2, 1] * my + V[2, 2] * mz + V[2, 3]
            rz = ONE / z
            u, v = x * rz, y * rz
            uc, vc = _in_frustum(u, fx, cx, width), _in_frustum(v, fy, cy, height)
            ax, bx, ay, by = fx * rz, -fx * rz * uc, fy * rz, -fy * rz * vc
            t00, t01, t02 = ax * V[0, 0] + bx * V[2, 0], ax * V[0, 1] + bx * V[2, 1], ax * V[0, 2] + bx * V[2, 2]
            t10, t11, t12 = ay * V[1, 0] + by * V[2, 0], ay * V[1, 1] + by * V[2, 1], ay * V[1, 2] + by * V[2, 2]

            # Inverse covariance to covariance: v_cov2d = -conic v_conic conic.
            s, vs = splats[c, g], v_splats[c, g]
            p, q, r = s[CXX], s[CXY], s[CYY]
            va, vb, vd = vs[CXX], HALF * vs[CXY], vs[CYY]
            m00, m01, m10, m11 = p * va + q * vb, p * vb + q * vd, q * va + r * vb, q * vb + r * vd
            gxx, gxy, gyy = -(m00 * p + m01 * q), -(m00 * q + m01 * r), -(m10 * q + m11 * r)

            # cov2d = T cov T^T.
            h00, h01, h02 = gxx * t00 + gxy * t10, gxx * t01 + gxy * t11, gxx * t02 + gxy * t12
            h10, h11, h12 = gxy * t00 + gyy * t10, gxy * t01 + gyy * t11, gxy * t02 + gyy * t12
            e00 += t00 * h00 + t10 * h10
            e01 += t00 * h01 + t10 * h11
            e02 += t00 * h02 + t10 * h12
            e11 += t01 * h01 + t11 * h11
            e12 += t01 * h02 + t11 * h12
            e22 += t02 * h02 + t12 * h12
            vt00, vt01, vt02 = _symmetric_times(c00, c01, c02, c11, c12, c22, TWO * h00, TWO * h01, TWO * h02)
            vt10, vt11, vt12 = _symmetric_times(c00, c01, c02, c11, c12, c22, TWO * h10, TWO * h11, TWO * h12)

            # T = J W with J = [ax 0 bx; 0 ay by].
            vax = vt00 * V[0, 0] + vt01 * V[0, 1] + vt02 * V[0, 2]
            vbx = vt00 * V[2, 0] + vt01 * V[2, 1] + vt02 * V[2, 2]
            vay = vt10 * V[1, 0] + vt11 * V[1, 1] + vt12 * V[1, 2]
            vby = vt10 * V[2, 0] + vt11 * V[2, 1] + vt12 * V[2, 2]
            fxz, fyz = fx * rz, fy * rz
            vu, vv = fx * v_means2d[c, g, 0], fy * v_means2d[c, g, 1]
            if uc == u:
                vu -= fxz * vbx
            if vc == v:
                vv -= fyz * vby
            vx, vy = vu * rz, vv * rz
            vz = -rz * (fxz * (vax - uc * vbx) + fyz * (vay - vc * vby)) - rz * (u * vu + v * vv)
            vmx += V[0, 0] * vx + V[1, 0] * vy + V[2, 0] * vz
            vmy += V[0, 1] * vx + V[1, 1] * vy + V[2, 1] * vz
            vmz += V[0, 2] * vx + V[1, 2] * vy + V[2, 2] * vz
            vop += vs[OPACITY]

            vr = vs[RED] if s[RED] > ZERO else ZERO
            vg = vs[GREEN] if s[GREEN] > ZERO else ZERO
            vb = vs[BLUE] if s[BLUE] > ZERO else ZERO
            v_sh[g, 0, 0] += SH0 * vr
            v_sh[g, 0, 1] += SH0 * vg
            v_sh[g, 0, 2] += SH0 * vb
            if k > 1:
                x, y, z = mx - centres[c, 0], my - centres[c, 1], mz - centres[c, 2]
                inv = ONE / math.sqrt(x * x + y * y + z * z)
                x, y, z = x * inv, y * inv, z * inv
                _basis(k, x, y, z, b)
                for i in range(1, k):
                    v_sh[g, i, 0] += b[i] * vr
                    v_sh[g, i, 1] += b[i] * vg
                    v_sh[g, i, 2] += b[i] * vb
                    w[i] = sh[g, i, 0] * vr + sh[g, i, 1] * vg + sh[g, i, 2] * vb
                gx, gy, gz = _basis_gradient(k, x, y, z, w)
                along = gx * x + gy * y + gz * z  # a direction's length does not count
                vmx += (gx - along * x) * inv
                vmy += (gy - along * y) * inv
                vmz += (gz - along * z) * inv

        if not seen:
            v_means[g, 0] = v_means[g, 1] = v_means[g, 2] = v_logit_opacities[g] = ZERO
            v_quats[g, 0] = v_quats[g, 1] = v_quats[g, 2] = v_quats[g, 3] = ZERO
            v_log_scales[g, 0] = v_log_scales[g, 1] = v_log_scales[g, 2] = ZERO
            continue
        v_means[g, 0], v_means[g, 1], v_means[g, 2] = vmx, vmy, vmz
        opacity = ONE / (ONE + math.exp(-logit_opacities[g]))
        v_logit_opacities[g] = vop * opacity * (ONE - opacity)

        # cov = R S^2 R^T, so v_R = 2 v_cov R S^2 and v_(log s) = 2 s^2 (R^T v_cov R) on the diagonal.
        d00, d10, d20 = _symmetric_times(e00, e01, e02, e11, e12, e22, r00, r10, r20)
        d01, d11, d21 = _symmetric_times(e00, e01, e02, e11, e12, e22, r01, r11, r21)
        d02, d12, d22 = _symmetric_times(e00, e01, e02, e11, e12, e22, r02, r12, r22)
        sx, sy, sz = TWO * sx, TWO * sy, TWO * sz
        v_log_scales[g, 0] = sx * (d00 * r00 + d10 * r10 + d20 * r20)
        v_log_scales[g, 1] = sy * (d01 * r01 + d11 * r11 + d21 * r21)
        v_log_scales[g, 2] = sz * (d02 * r02 + d12 * r12 + d22 * r22)
        d00, d10, d20 = d00 * sx, d10 * sx, d20 * sx
        d01, d11, d21 = d01 * sy, d11 * sy, d21 * sy
        d02, d12, d22 = d02 * sz, d12 * sz, d22 * sz
        vw = TWO * (qx * (d21 - d12) + qy * (d02 - d20) + qz * (d10 - d01))
        vx = TWO * (qy * (d01 + d10) + qz * (d02 + d20) + qw * (d21 - d12) - TWO * qx * (d11 + d22))
        vy = TWO * (qx * (d01 + d10) + qz * (d12 + d21) + qw * (d02 - d20) - TWO * qy * (d00 + d22))
        vz = TWO * (qx * (d02 + d20) + qy * (d12 + d21) + qw * (d10 - d01) - TWO * qz * (d00 + d11))
        along = vw * qw + vx * qx + vy * qy + vz * qz
        v_quats[g, 0], v_quats[g, 1] = (vw - along * qw) * qinv, (vx - along * qx) * qinv
        v_quats[g, 2], v_quats[g, 3] = (vy - along * qy) * qinv, (vz - along * qz) * qinv
