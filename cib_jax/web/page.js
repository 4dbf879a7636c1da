// Behavior of the page. Gradio runs this once, after code_glyph.js and api.js, with `element`, `props`, `trigger` and
// `watch`. The current search is in the page's URL, so that links, back and forward work. File names only ever become
// text nodes, so that markup in them has no effect.

const part = (name) => element.querySelector(`.cib-${name}`);
const results = element.querySelector("#cib-results");
const file = element.querySelector("#cib-file");
let shown = null; // {id or code, k, query, answer}
let k = props.value.k;
let running = null; // AbortController of the search that runs
let sliderTimer = null;

const textElement = (tag, className, content) => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = content;
  return node;
};
const formatBits = (n) => (n === 1 ? "1 bit" : `${n} bits`);
const formatMegabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

function clampK(value) {
  const whole = Math.round(Number(value));
  return Number.isFinite(whole) && whole >= 1 ? Math.min(whole, props.max_k) : k;
}

function linkTo({ id, code, k }) {
  const parameters = new URLSearchParams(location.search);
  for (const name of ["id", "code", "k"]) parameters.delete(name);
  parameters.set(id ? "id" : "code", id || code);
  parameters.set("k", k);
  return `?${parameters}`;
}

function searchOfUrl() {
  const parameters = new URLSearchParams(location.search);
  return {
    id: parameters.get("id"),
    code: parameters.get("code")?.toLowerCase() ?? null,
    k: parameters.has("k") ? clampK(parameters.get("k")) : k,
  };
}

// `historyMode`: "push" after a user's choice, "replace" after the page's own, null if the URL is already right.
async function show(next, historyMode) {
  running?.abort();
  clearTimeout(sliderTimer);
  const mine = (running = new AbortController());
  part("stage").classList.add("busy");
  part("found").setAttribute("aria-busy", "true");
  try {
    const found = await search(next, mine.signal);
    if (mine !== running) return;
    shown = found;
    if (historyMode) history[`${historyMode}State`](null, "", linkTo(shown));
    showNotice("");
    draw();
    if (historyMode === "push") focusQuery();
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    if (historyMode === null || shown === null) clear();
    // The notice names the photo, because another one may still be displayed.
    showNotice(next.photo?.name ? `${next.photo.name}: ${error.message}` : error.message);
  } finally {
    if (mine === running) {
      part("stage").classList.remove("busy");
      part("found").removeAttribute("aria-busy");
    }
  }
}

function searchWithFile(files) {
  const photo = files[0];
  if (!photo) return showNotice("That contains no file. Save the photo first, then drop the file.");
  if (photo.type && !photo.type.startsWith("image/")) return showNotice(`${photo.name} is not a photo.`);
  if (!photo.size) return showNotice(`${photo.name} is empty.`);
  if (photo.size > props.max_bytes) {
    const [size, limit] = [photo.size, props.max_bytes].map(formatMegabytes);
    return showNotice(`${photo.name} has ${size}; a photo may have at most ${limit}.`);
  }
  show({ k, photo }, "push");
}

// Display

function showNotice(sentence) {
  part("notice").textContent = sentence;
}

function focusQuery() {
  const heading = element.querySelector("#cib-query-name");
  heading.focus({ preventScroll: true });
  if (part("query").getBoundingClientRect().top < 0) {
    const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
    element.scrollIntoView({ behavior: reduced ? "auto" : "smooth" });
  }
}

function clear() {
  shown = null;
  document.title = "Photo search";
  part("query").hidden = true;
  results.replaceChildren();
  part("status").textContent = "";
}

function pathNodes(path) {
  const cut = path.lastIndexOf("/") + 1;
  const whole = textElement("bdi", "cib-path", "");
  whole.title = path;
  if (cut) whole.append(textElement("span", "cib-folder", path.slice(0, cut)));
  whole.append(textElement("span", "cib-name", path.slice(cut)));
  return whole;
}

function largerLink({ id, path, width, height }) {
  const link = textElement("a", "cib-larger", `${width} × ${height} ↗`);
  link.href = imageOf(id);
  link.target = "_blank";
  link.rel = "noopener";
  link.setAttribute("aria-label", `Open ${path} larger, ${width} by ${height} pixels`);
  return link;
}

function draw() {
  const { query, code, answer } = shown;
  const name = query ? query.path : uploaded.get(code)?.name ?? "A photo of which only the code is known";
  document.title = `${name} · Photo search`;
  element.querySelector("#cib-query-name").replaceChildren(pathNodes(name));
  part("query").hidden = false;
  if (query) drawIndexedQuery(query);
  else drawUploadedQuery(uploaded.get(code));
  part("hex").textContent = answer.query.code.replace(/(.{4})(?=.)/g, "$1 ");
  drawQueryCode(null);

  const others = answer.results.filter((result) => result.id !== query?.id).slice(0, shown.k);
  results.replaceChildren(...others.map(card));
  const distances = others.map((result) => result.distance);
  part("status").textContent = others.length
    ? `${others.length} nearest, ${distances[0]} to ${distances.at(-1)} of ${answer.bits} bits apart`
    : "The collection has no other photo.";
}

function showPhoto(source, alt, note) {
  const photo = part("photo");
  photo.hidden = source === null;
  photo.alt = alt;
  photo.removeAttribute("width");
  photo.removeAttribute("height");
  if (source) photo.src = source;
  else photo.removeAttribute("src");
  part("gone").textContent = note;
}

function drawIndexedQuery(query) {
  showPhoto(thumbnailOf(query.id), query.path, "");
  part("photo").width = query.width;
  part("photo").height = query.height;
  part("size").replaceChildren(largerLink(query));
  const larger = new Image();
  larger.src = imageOf(query.id);
  larger.decode().then(
    () => shown?.id === query.id && (part("photo").src = larger.src),
    () => shown?.id === query.id && (part("gone").textContent = "The file cannot be read; this is its thumbnail."),
  );
}

function drawUploadedQuery(photo) {
  part("size").textContent = "";
  if (!photo) return showPhoto(null, "", "The photo is not available: a link contains only its code.");
  showPhoto(photo.url, photo.name, "");
  const image = part("photo");
  image.decode().then(
    () => image.src === photo.url && (part("size").textContent = `${image.naturalWidth} × ${image.naturalHeight}`),
    () => image.src === photo.url && showPhoto(null, "", "This browser cannot display the photo, but the search used it."),
  );
}

function card(result) {
  const { id, path, distance, code, width, height } = result;
  const bits = shown.answer.bits;
  const item = document.createElement("li");
  item.className = "cib-card";
  item.dataset.id = id;
  item.dataset.code = code;
  item.style.setProperty("--shape", width / height);

  const pick = document.createElement("a");
  pick.className = "cib-pick";
  pick.href = linkTo({ id, k: shown.k });
  pick.setAttribute("aria-label", `${path}: ${distance} of ${bits} bits differ. Search from this photo`);
  const image = document.createElement("img");
  Object.assign(image, { alt: path, loading: "lazy", decoding: "async", draggable: false, src: thumbnailOf(id) });
  image.addEventListener("error", () => pick.classList.add("gone"));
  pick.append(image);

  const places = differingBits(shown.answer.query.code, code).map((place) => place + 1);
  const facts = textElement("div", "cib-facts", "");
  const strip = drawBits(code, shown.answer.query.code, places.length ? `Bits that differ: ${places.join(", ")}` : "No bit differs");
  facts.append(textElement("span", "cib-distance", formatBits(distance)), strip);
  item.append(pick, facts, pathNodes(path), largerLink(result));
  return item;
}

// Draws the query's code, compared with that of the result under the pointer, if any.
function drawQueryCode(item) {
  if (!shown) return;
  const code = shown.answer.query.code;
  const other = item?.dataset.code ?? null;
  const on = bitsOf(code).filter(Boolean).length;
  part("bits").replaceChildren(drawBits(code, other, `Code ${code}: ${on} of ${shown.answer.bits} bits are 1`));
  part("key").textContent = other === null ? "■ 1   □ 0" : `${formatBits(differingBits(code, other).length)} differ`;
}

// Events

results.addEventListener("click", (event) => {
  const pick = event.target.closest(".cib-pick");
  if (!pick || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show({ id: pick.closest("li").dataset.id, k }, "push");
});
results.addEventListener("keydown", (event) => {
  const pick = event.key === " " && event.target.closest(".cib-pick");
  if (!pick) return;
  event.preventDefault();
  pick.click();
});
for (const kind of ["pointerover", "focusin"]) {
  results.addEventListener(kind, (event) => drawQueryCode(event.target.closest("li")));
}
for (const kind of ["pointerleave", "focusout"]) results.addEventListener(kind, () => drawQueryCode(null));

file.addEventListener("change", () => {
  searchWithFile(file.files);
  file.value = "";
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) searchWithFile(event.clipboardData.files);
});
const dragsFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!dragsFile(event)) return;
  event.preventDefault();
  part("stage").classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget || part("stage").classList.remove("over"));
addEventListener("drop", (event) => {
  part("stage").classList.remove("over");
  if (!dragsFile(event)) return;
  event.preventDefault();
  searchWithFile(event.dataTransfer.files);
});

function followUrl(historyMode) {
  const next = searchOfUrl();
  k = next.k;
  props.value = { ...props.value, k };
  trigger("navigated"); // sets the slider
  show(next, historyMode);
}
addEventListener("popstate", () => followUrl(null));

// Gradio also sets the initial value again, so only a changed counter is an event.
let { moved, random } = props.value;
watch("value", () => {
  const value = props.value;
  if (value.random !== random) {
    ({ moved, random } = value);
    return show({ k, exclude: shown?.id }, "push");
  }
  if (value.moved === moved) return;
  moved = value.moved;
  k = clampK(value.k);
  clearTimeout(sliderTimer);
  if (shown) sliderTimer = setTimeout(() => show({ id: shown.id, code: shown.code, k }, "replace"), 150);
});

followUrl("replace");
