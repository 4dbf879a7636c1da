// What the page does. Gradio runs it once with `element`, `props`, `trigger` and `watch`; bits.js and
// asking.js stand before it.
// What is shown stands in the address, so links, back and forward work. File names go into text nodes alone.

const part = (name) => element.querySelector(`.cib-${name}`);
const results = element.querySelector("#cib-results");
const file = element.querySelector("#cib-file");
let shown = null; // {id or code, k, query, answer}
let howMany = props.value.k;
let running = null;
let settling = null;

const text = (tag, className, words) => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = words;
  return node;
};
const bitsWord = (n) => (n === 1 ? "1 bit" : `${n} bits`);
const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

function limited(k) {
  const whole = Math.round(Number(k));
  return Number.isFinite(whole) && whole >= 1 ? Math.min(whole, props.most_results) : howMany;
}

function linkTo({ id, code, k }) {
  const words = new URLSearchParams(location.search);
  for (const name of ["id", "code", "k"]) words.delete(name);
  words.set(id ? "id" : "code", id || code);
  words.set("k", k);
  return `?${words}`;
}

function fromAddress() {
  const words = new URLSearchParams(location.search);
  const k = words.has("k") ? limited(words.get("k")) : howMany;
  return { id: words.get("id"), code: words.get("code")?.toLowerCase() ?? null, k };
}

// `to`: "push" where someone chose, "replace" where the page did, null where the address says so already.
async function show(next, to) {
  running?.abort();
  clearTimeout(settling);
  const mine = (running = new AbortController());
  part("stage").classList.add("busy");
  part("found").setAttribute("aria-busy", "true");
  try {
    const found = await ask(next, mine.signal);
    if (mine !== running) return;
    shown = found;
    if (to) history[`${to}State`](null, "", linkTo(shown));
    say("");
    draw();
    if (to === "push") attend();
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    if (to === null || shown === null) clear();
    // Named, since another photo may still be shown.
    say(next.photo?.name ? `${next.photo.name}: ${error.message}` : error.message);
  } finally {
    if (mine === running) {
      part("stage").classList.remove("busy");
      part("found").removeAttribute("aria-busy");
    }
  }
}

function take(files) {
  const photo = files[0];
  if (!photo) return say("There was no file in that. Save the photo first, then drop the file.");
  if (photo.type && !photo.type.startsWith("image/")) return say(`${photo.name} is not a photo.`);
  if (!photo.size) return say(`${photo.name} is empty.`);
  if (photo.size > props.most_bytes) {
    return say(`${photo.name} has ${megabytes(photo.size)}; a photo may have ${megabytes(props.most_bytes)} at most.`);
  }
  show({ k: howMany, photo }, "push");
}

// Showing

function say(sentence) {
  part("notice").textContent = sentence;
}

function attend() {
  const heading = element.querySelector("#cib-query-name");
  heading.focus({ preventScroll: true });
  if (part("query").getBoundingClientRect().top < 0) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    element.scrollIntoView({ behavior: still ? "auto" : "smooth" });
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
  const whole = text("bdi", "cib-path", "");
  whole.title = path;
  if (cut) whole.append(text("span", "cib-folder", path.slice(0, cut)));
  whole.append(text("span", "cib-name", path.slice(cut)));
  return whole;
}

function largerLink({ id, path, width, height }) {
  const link = text("a", "cib-larger", `${width} × ${height} ↗`);
  link.href = imageOf(id);
  link.target = "_blank";
  link.rel = "noopener";
  link.setAttribute("aria-label", `Open ${path} larger, ${width} by ${height} pixels`);
  return link;
}

function draw() {
  const { query, code, answer } = shown;
  const name = query ? query.path : uploaded.get(code)?.name ?? "A photo known by its code";
  document.title = `${name} · Photo search`;
  element.querySelector("#cib-query-name").replaceChildren(pathNodes(name));
  part("query").hidden = false;
  if (query) drawKnown(query);
  else drawUploaded(uploaded.get(code));
  part("hex").textContent = answer.query.code.replace(/(.{4})(?=.)/g, "$1 ");
  peek(null);

  const others = answer.results.filter((result) => result.id !== query?.id).slice(0, shown.k);
  results.replaceChildren(...others.map(card));
  const distances = others.map((result) => result.distance);
  part("status").textContent = others.length
    ? `${others.length} nearest, ${distances[0]} to ${distances.at(-1)} of ${answer.bits} bits apart`
    : "There is no other photo in this collection.";
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

function drawKnown(query) {
  showPhoto(thumbnailOf(query.id), query.path, "");
  part("photo").width = query.width;
  part("photo").height = query.height;
  part("size").replaceChildren(largerLink(query));
  const larger = new Image();
  larger.src = imageOf(query.id);
  larger.decode().then(
    () => shown?.id === query.id && (part("photo").src = larger.src),
    () => shown?.id === query.id && (part("gone").textContent = "The file could not be read; this is its thumbnail."),
  );
}

function drawUploaded(photo) {
  part("size").textContent = "";
  if (!photo) return showPhoto(null, "", "Its photo was not kept: a link holds the code alone.");
  showPhoto(photo.url, photo.name, "");
  const image = part("photo");
  image.decode().then(
    () => image.src === photo.url && (part("size").textContent = `${image.naturalWidth} × ${image.naturalHeight}`),
    () => image.src === photo.url && showPhoto(null, "", "This browser cannot show the photo, but it was searched with."),
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
  pick.setAttribute("aria-label", `${path}: ${distance} of ${bits} bits differ. Search on from it`);
  const image = document.createElement("img");
  Object.assign(image, { alt: path, loading: "lazy", decoding: "async", draggable: false, src: thumbnailOf(id) });
  image.addEventListener("error", () => pick.classList.add("gone"));
  pick.append(image);

  const places = differing(shown.answer.query.code, code).map((place) => place + 1);
  const facts = text("div", "cib-facts", "");
  const strip = drawBits(code, shown.answer.query.code, places.length ? `Bits that differ: ${places.join(", ")}` : "No bit differs");
  facts.append(text("span", "cib-distance", bitsWord(distance)), strip);
  item.append(pick, facts, pathNodes(path), largerLink(result));
  return item;
}

// The query's code, beside the code of the result that is pointed at.
function peek(item) {
  if (!shown) return;
  const code = shown.answer.query.code;
  const other = item?.dataset.code ?? null;
  const on = bitsOf(code).filter(Boolean).length;
  part("bits").replaceChildren(drawBits(code, other, `Code ${code}: ${on} of ${shown.answer.bits} bits are 1`));
  part("key").textContent = other === null ? "■ 1   □ 0" : `${bitsWord(differing(code, other).length)} differ`;
}

// Listening

results.addEventListener("click", (event) => {
  const pick = event.target.closest(".cib-pick");
  if (!pick || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show({ id: pick.closest("li").dataset.id, k: howMany }, "push");
});
results.addEventListener("keydown", (event) => {
  const pick = event.key === " " && event.target.closest(".cib-pick");
  if (!pick) return;
  event.preventDefault();
  pick.click();
});
for (const kind of ["pointerover", "focusin"]) {
  results.addEventListener(kind, (event) => peek(event.target.closest("li")));
}
for (const kind of ["pointerleave", "focusout"]) results.addEventListener(kind, () => peek(null));

file.addEventListener("change", () => {
  take(file.files);
  file.value = "";
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) take(event.clipboardData.files);
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
  take(event.dataTransfer.files);
});

function followAddress(to) {
  const next = fromAddress();
  howMany = next.k;
  props.value = { ...props.value, k: howMany };
  trigger("went");
  show(next, to);
}
addEventListener("popstate", () => followAddress(null));

// Gradio sets the value again as it was at first, too; only what counts up is news.
let { moved, random } = props.value;
watch("value", () => {
  const told = props.value;
  if (told.random !== random) {
    ({ moved, random } = told);
    return show({ k: howMany, butNot: shown?.id }, "push");
  }
  if (told.moved === moved) return;
  moved = told.moved;
  howMany = limited(told.k);
  clearTimeout(settling);
  if (shown) settling = setTimeout(() => show({ id: shown.id, code: shown.code, k: howMany }, "replace"), 150);
});

followAddress("replace");
