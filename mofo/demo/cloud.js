// A viewer of a .glb of points that needs no WebGL. Gradio's own shows points one screen pixel
// large, which for a small picture is next to nothing; here they are squares, the nearest on top.
// `element`, `props` and `watch` are Gradio's; props.value is the address of the file.
const BACKGROUND = 0xffccc8c8, MAX_SIDE = 12, DISTANCE = 3, FILL = 0.45;
let points = null, colours = null, centre = [0, 0, 0], half = [1, 1, 1], yaw, pitch;

// glTF holds linear light, a canvas takes sRGB.
const encoded = Uint8Array.from({ length: 256 }, (_, i) => {
  const light = i / 255;
  const code = light <= 0.0031308 ? 12.92 * light : 1.055 * light ** (1 / 2.4) - 0.055;
  return 255 * code + 0.5;
});

// Where most points lie along an axis: a few far ones must not shrink the others.
const measure = (axis) => {
  const values = points.filter((_, i) => i % 3 === axis).sort();
  const [low, high] = [0.02, 0.98].map((share) => values[Math.floor(share * (values.length - 1))]);
  centre[axis] = (low + high) / 2;
  half[axis] = (high - low) / 2 || 1;
};

const load = async () => {
  points = null;
  if (!props.value) return;
  const bytes = await (await fetch(props.value)).arrayBuffer();
  const length = new DataView(bytes).getUint32(12, true);
  const gltf = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 20, length)));
  const { POSITION, COLOR_0 } = gltf.meshes[0].primitives[0].attributes;
  const start = (k) => 28 + length + gltf.bufferViews[gltf.accessors[k].bufferView].byteOffset;
  const count = gltf.accessors[POSITION].count;
  points = new Float32Array(bytes, start(POSITION), 3 * count);
  const light = new Uint8Array(bytes, start(COLOR_0), 4 * count);
  colours = new Uint32Array(light.map((value, i) => (i % 4 === 3 ? value : encoded[value])).buffer);
  [0, 1, 2].forEach(measure);
  [yaw, pitch] = [0.3, 0.12];
  draw();
};

const draw = () => {
  const canvas = element.querySelector("canvas");
  if (!points || !canvas || !canvas.clientWidth) return;
  const ratio = Math.min(window.devicePixelRatio, 2);
  const [w, h] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * ratio));
  Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d"), image = context.createImageData(w, h);
  const pixels = new Uint32Array(image.data.buffer).fill(BACKGROUND);
  const nearest = new Float32Array(w * h).fill(-Infinity);
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  const away = DISTANCE * Math.max(...half);
  const zoom = FILL * away * Math.min(w / half[0], h / half[1]);
  const side = Math.min(MAX_SIDE, Math.ceil(Math.sqrt((0.5 * w * h) / colours.length)));
  for (let i = 0; i < colours.length; i++) {
    const x = points[3 * i] - centre[0], y = points[3 * i + 1] - centre[1];
    const z = points[3 * i + 2] - centre[2];
    const back = cy * z - sy * x, near = sp * y + cp * back;
    if (near > 0.9 * away) continue;
    const scale = zoom / (away - near);
    const left = Math.round(w / 2 + scale * (cy * x + sy * z) - side / 2);
    const top = Math.round(h / 2 - scale * (cp * y - sp * back) - side / 2);
    for (let v = Math.max(0, top); v < Math.min(h, top + side); v++)
      for (let u = Math.max(0, left); u < Math.min(w, left + side); u++)
        if (near > nearest[v * w + u]) {
          nearest[v * w + u] = near;
          pixels[v * w + u] = colours[i];
        }
  }
  context.putImageData(image, 0, 0);
};

element.addEventListener("pointerdown", (event) => event.target.setPointerCapture(event.pointerId));
element.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  yaw += event.movementX / 150;
  pitch = Math.max(-1.2, Math.min(1.2, pitch + event.movementY / 150));
  requestAnimationFrame(draw);
});
new ResizeObserver(draw).observe(element);
// Gradio may put a new, empty canvas in the place of one that was drawn.
new MutationObserver(draw).observe(element, { childList: true, subtree: true });
watch("value", load);
load();
