// Drawings of codes, 16 bits per row. Bit j is bit 7 − j mod 8 of byte j // 8, as in numpy.packbits.

const COLUMNS = 16;
const SVG = "http://www.w3.org/2000/svg";

function bitsOf(hex) {
  return Array.from(hex).flatMap((digit) => [8, 4, 2, 1].map((weight) => (parseInt(digit, 16) & weight ? 1 : 0)));
}

function differingBits(hex, other) {
  const bits = bitsOf(other);
  return bitsOf(hex).flatMap((bit, place) => (bit === bits[place] ? [] : [place]));
}

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// A bit is drawn filled if it is 1, and as an outline if it is 0. In comparison with another code, equal bits shrink to
// dots and differing bits stay squares, so that color is not the only distinction.
function drawBits(hex, other, label) {
  const bits = bitsOf(hex);
  const apart = new Set(other === null ? [] : differingBits(hex, other));
  const rows = Math.ceil(bits.length / COLUMNS);
  const columns = Math.min(COLUMNS, bits.length);
  const svg = shape("svg", { viewBox: `0 0 ${columns * 10} ${rows * 10}`, role: "img", "aria-label": label });
  bits.forEach((bit, place) => {
    const x = (place % COLUMNS) * 10 + 5;
    const y = Math.floor(place / COLUMNS) * 10 + 5;
    const dot = other !== null && !apart.has(place);
    const half = dot ? 1.6 : 3.6;
    const kind = `${bit ? "on" : "off"}${apart.has(place) ? " apart" : ""}`;
    const box = { x: x - half, y: y - half, width: 2 * half, height: 2 * half, rx: dot ? half : 1 };
    svg.append(shape("rect", { ...box, class: kind, "data-place": place }));
  });
  return svg;
}

