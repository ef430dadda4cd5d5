// Worker: the order of Gaussians from back to front, by a counting sort of their depths.

const BUCKETS = 65536;
let centers = new Float32Array(0);

onmessage = ({ data }) => {
  if (data.centers) {
    centers = data.centers;
    return;
  }
  const [x, y, z] = data.forward; // of the camera, in world axes: the depth is a product with it
  const count = centers.length / 3;
  const depths = new Float32Array(count);
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < count; i++) {
    const depth = x * centers[3 * i] + y * centers[3 * i + 1] + z * centers[3 * i + 2];
    depths[i] = depth;
    if (depth < low) low = depth;
    if (depth > high) high = depth;
  }
  const scale = (BUCKETS - 1) / Math.max(high - low, 1e-9);
  const buckets = new Uint16Array(count), starts = new Uint32Array(BUCKETS + 1);
  for (let i = 0; i < count; i++) {
    buckets[i] = (high - depths[i]) * scale; // the farthest first
    starts[buckets[i] + 1]++;
  }
  for (let bucket = 0; bucket < BUCKETS; bucket++) starts[bucket + 1] += starts[bucket];
  const order = new Uint32Array(count);
  for (let i = 0; i < count; i++) order[starts[buckets[i]]++] = i;
  postMessage({ order, turn: data.turn }, [order.buffer]);
};
