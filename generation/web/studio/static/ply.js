// A 3D Gaussian splat from a binary PLY of 3DGS (Kerbl et al. 2023), as this service writes it.

const SH_C0 = 0.28209479177387814;
const SIZES = { char: 1, uchar: 1, int8: 1, uint8: 1, short: 2, ushort: 2, int16: 2, uint16: 2,
  int: 4, uint: 4, int32: 4, uint32: 4, float: 4, float32: 4, double: 8, float64: 8 };

/**
 * What the renderer draws of a PLY (an ArrayBuffer): `count`, `centers` (3 each, world units), `texels` (12 floats
 * each: centre and colour with opacity as 4 bytes; the six entries of the covariance; two unused), and the `bounds`.
 * Throws an Error that names what is wrong with the file.
 */
export function parsePly(buffer) {
  const head = new TextDecoder("latin1").decode(buffer.slice(0, 4096));
  const end = head.indexOf("end_header\n");
  if (!head.startsWith("ply\n") || end < 0) throw new Error("not a PLY file");
  if (!head.includes("\nformat binary_little_endian 1.0\n")) throw new Error("not a binary little-endian PLY");
  const vertex = head.match(/\nelement vertex (\d+)\n/);
  if (!vertex) throw new Error("a PLY without vertices");
  const count = Number(vertex[1]);
  const offsets = {};
  let stride = 0;
  for (const [, type, name] of head.slice(0, end).matchAll(/^property (\w+) (\w+)$/gm)) {
    if (!(type in SIZES)) throw new Error(`property ${name} of unknown type ${type}`);
    offsets[name] = stride;
    stride += SIZES[type];
  }
  const start = end + "end_header\n".length;
  if (buffer.byteLength < start + count * stride) throw new Error("the PLY is truncated");
  const view = new DataView(buffer, start);
  const field = (name) => {
    if (!(name in offsets)) throw new Error(`the PLY has no property ${name}`);
    const offset = offsets[name];
    return (i) => view.getFloat32(i * stride + offset, true);
  };
  const [x, y, z] = ["x", "y", "z"].map(field);
  const colour = ["f_dc_0", "f_dc_1", "f_dc_2"].map(field);
  const opacity = field("opacity");
  const scale = ["scale_0", "scale_1", "scale_2"].map(field);
  const rotation = ["rot_0", "rot_1", "rot_2", "rot_3"].map(field);

  const centers = new Float32Array(count * 3);
  const texels = new Float32Array(count * 12);
  const bytes = new Uint8Array(texels.buffer);
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let i = 0; i < count; i++) {
    const at = i * 12, centre = [x(i), y(i), z(i)];
    for (let axis = 0; axis < 3; axis++) {
      centers[i * 3 + axis] = texels[at + axis] = centre[axis];
      low[axis] = Math.min(low[axis], centre[axis]);
      high[axis] = Math.max(high[axis], centre[axis]);
      bytes[(at + 3) * 4 + axis] = Math.round(255 * Math.min(1, Math.max(0, 0.5 + SH_C0 * colour[axis](i))));
    }
    bytes[(at + 3) * 4 + 3] = Math.round(255 / (1 + Math.exp(-opacity(i))));
    covariance(rotation.map((each) => each(i)), scale.map((each) => Math.exp(each(i))), texels, at + 4);
  }
  return { count, centers, texels, bounds: { low, high } };
}

/** R S (R S)^T of a quaternion (w, x, y, z) and scales: xx, xy, xz, yy, yz, zz. */
function covariance(quaternion, scales, out, at) {
  const norm = Math.hypot(...quaternion) || 1;
  const [w, x, y, z] = quaternion.map((each) => each / norm);
  const rows = [
    [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
  ];
  let k = 0;
  for (let i = 0; i < 3; i++) {
    for (let j = i; j < 3; j++) {
      let sum = 0;
      for (let axis = 0; axis < 3; axis++) sum += rows[i][axis] * rows[j][axis] * scales[axis] * scales[axis];
      out[at + k++] = sum;
    }
  }
}
