// Draws a Gaussian splat with WebGL2: one quad for each Gaussian, from back to front (EWA splatting, Zwicker et al. 2001,
// as the project's rasteriser has it: a filter of 0.3 square pixels, nothing under 1/255). On demand only.

const VERTEX = `#version 300 es
precision highp float;
precision highp int;
uniform highp sampler2D texels;   // three for each Gaussian
uniform mat4 view;                // world to camera; OpenGL axes
uniform vec2 focal, size;         // pixels
in vec2 corner;
in uint index;
out vec4 colour;
out vec2 offset;                  // from the centre, in standard deviations
const vec4 NOWHERE = vec4(0.0, 0.0, 2.0, 1.0);

void main() {
  gl_Position = NOWHERE;
  int width = textureSize(texels, 0).x, first = int(index) * 3;
  ivec2 at = ivec2(first % width, first / width);
  vec4 a = texelFetch(texels, at, 0), b = texelFetch(texels, at + ivec2(1, 0), 0), c = texelFetch(texels, at + ivec2(2, 0), 0);
  vec3 centre = (view * vec4(a.xyz, 1.0)).xyz;
  float depth = -centre.z;
  if (depth < 0.01) return;
  uint packed = floatBitsToUint(a.w);
  colour = vec4(packed & 255u, (packed >> 8) & 255u, (packed >> 16) & 255u, packed >> 24) / 255.0;
  if (colour.a < 1.0 / 255.0) return;

  mat3 covariance = mat3(b.x, b.y, b.z, b.y, b.w, c.x, b.z, c.x, c.y);
  vec2 limit = 1.3 * 0.5 * size / focal;
  vec2 slope = clamp(centre.xy / depth, -limit, limit);
  mat3 project = mat3(focal.x / depth, 0.0, 0.0, 0.0, focal.y / depth, 0.0, focal.x * slope.x / depth, focal.y * slope.y / depth, 0.0);
  mat3 into = project * mat3(view);
  mat3 seen = into * covariance * transpose(into);
  float xx = seen[0][0] + 0.3, yy = seen[1][1] + 0.3, xy = seen[0][1];
  float middle = 0.5 * (xx + yy), spread = sqrt(max(0.0, middle * middle - (xx * yy - xy * xy)));
  vec2 major = abs(xy) < 1e-9 ? (xx < yy ? vec2(0.0, 1.0) : vec2(1.0, 0.0)) : normalize(vec2(xy, middle + spread - xx));
  float far = min(3.33, sqrt(2.0 * log(colour.a * 255.0)));
  vec2 first_axis = major * sqrt(middle + spread), second_axis = vec2(-major.y, major.x) * sqrt(max(middle - spread, 0.0));
  offset = corner * far;
  vec2 pixels = focal * centre.xy / depth + offset.x * first_axis + offset.y * second_axis;
  gl_Position = vec4(pixels / (0.5 * size), 0.0, 1.0);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec4 colour;
in vec2 offset;
out vec4 drawn;
void main() {
  float alpha = min(0.999, colour.a * exp(-0.5 * dot(offset, offset)));
  if (alpha < 1.0 / 255.0) discard;
  drawn = vec4(colour.rgb * alpha, alpha);
}`;

const TEXELS_WIDTH = 3 * 1024;
const FOV = 49.1; // degrees, of the shorter side, as validators look
const CLOSEST = 0.2, FARTHEST = 20; // of the camera, in longest sides of the bounding box
export const FRONT = { azimuth: 0, elevation: 15, distance: 2.5 / 1.5, pan: [0, 0, 0] };

export class SplatView {
  /** On a canvas; `changed` is called after each picture. Throws an Error where there is no WebGL2. */
  constructor(canvas, changed = () => {}) {
    this.canvas = canvas;
    this.camera = structuredClone(FRONT); // degrees; the distance in longest sides of the bounding box
    this.background = [1, 1, 1];
    this.changed = changed;
    this.drawnTurn = -1; // the turn that the last picture had its order from
    this.gl = canvas.getContext("webgl2", { alpha: false, antialias: false, preserveDrawingBuffer: true });
    if (!this.gl) throw new Error("this browser has no WebGL2");
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { this._prepare(); if (this.splat) this.show(this.splat); });
    this._prepare();
    this.worker = new Worker(new URL("sort.js", import.meta.url));
    this.worker.onmessage = ({ data }) => this._sorted(data);
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  _prepare() {
    const gl = this.gl, program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`WebGL: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    this.uniforms = Object.fromEntries(["view", "focal", "size"].map((name) => [name, gl.getUniformLocation(program, name)]));
    const corners = gl.getAttribLocation(program, "corner"), index = gl.getAttribLocation(program, "index");
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(corners);
    gl.vertexAttribPointer(corners, 2, gl.FLOAT, false, 0, 0);
    this.order = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
    gl.enableVertexAttribArray(index);
    gl.vertexAttribIPointer(index, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(index, 1);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.ready = 0; // Gaussians whose order is known
  }

  /** What `parsePly` made of a file; null: nothing. */
  show(splat) {
    this.splat = splat;
    this.ready = 0;
    this.turn = (this.turn ?? 0) + 1;
    this.sorting = false;
    if (!splat) return this.draw();
    const gl = this.gl, rows = Math.max(1, Math.ceil((splat.count * 3) / TEXELS_WIDTH));
    const texels = new Float32Array(rows * TEXELS_WIDTH * 4);
    texels.set(splat.texels);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, TEXELS_WIDTH, rows, 0, gl.RGBA, gl.FLOAT, texels);
    this.worker.postMessage({ centers: splat.centers });
    this.draw();
  }

  /** Look from elsewhere; only what is given changes. */
  look(camera) {
    Object.assign(this.camera, camera);
    this.camera.elevation = Math.min(89, Math.max(-89, this.camera.elevation));
    this.camera.distance = Math.min(FARTHEST, Math.max(CLOSEST, this.camera.distance));
    this.draw();
  }

  /** World to camera (column-major, OpenGL axes), and the camera's axes. */
  _pose() {
    const { low, high } = this.splat.bounds, rad = Math.PI / 180;
    const longest = Math.max(...high.map((each, axis) => each - low[axis]), 1e-3);
    const { azimuth, elevation, distance, pan } = this.camera;
    const [sa, ca, se, ce] = [Math.sin(azimuth * rad), Math.cos(azimuth * rad), Math.sin(elevation * rad), Math.cos(elevation * rad)];
    const back = [sa * ce, se, ca * ce], right = [ca, 0, -sa], up = [-sa * se, ce, -ca * se];
    const eye = back.map((each, axis) => (low[axis] + high[axis]) / 2 + pan[axis] * longest + each * distance * longest);
    const dot = (axis) => -axis.reduce((sum, each, i) => sum + each * eye[i], 0);
    const columns = [0, 1, 2].flatMap((i) => [right[i], up[i], back[i], 0]);
    return { matrix: new Float32Array([...columns, dot(right), dot(up), dot(back), 1]), right, up, back };
  }

  /** Ask for a picture, in the next frame. */
  draw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this._draw(); });
  }

  _draw() {
    const gl = this.gl, canvas = this.canvas, ratio = this.pixelRatio ?? window.devicePixelRatio;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio)), height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clearColor(...this.background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.splat) return this.changed();
    const { matrix, back } = this._pose(), forward = back.map((each) => -each);
    this._sort(forward);
    const focal = Math.min(width, height) / 2 / Math.tan((FOV / 2) * (Math.PI / 180)); // a narrow canvas cuts nothing off
    gl.uniformMatrix4fv(this.uniforms.view, false, matrix);
    gl.uniform2f(this.uniforms.focal, focal, focal);
    gl.uniform2f(this.uniforms.size, width, height);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.ready);
    this.changed();
  }

  /** One order at a time is asked for, and the latest direction next. */
  _sort(forward) {
    if (this.sortedFor && this.ready && forward.every((each, i) => Math.abs(each - this.sortedFor[i]) < 1e-6)) return;
    if (this.sorting) return;
    this.sorting = true;
    this.sortedFor = forward;
    this.worker.postMessage({ forward, turn: this.turn });
  }

  _sorted({ order, turn }) {
    if (turn !== this.turn) return; // of a splat that is shown no more
    this.sorting = false;
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
    gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
    this.ready = order.length;
    this.draw();
  }
}
