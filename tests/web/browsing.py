"""A headless Chromium, and the state of the search page in it."""

import contextlib
import http.client
import http.server
import io
import json
import re
import shutil
import threading
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync"]


@contextlib.contextmanager
def chromium(profile):
    """Starts a browser without history or cache, which logs its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in [*FLAGS, f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def proxy(folder, port):
    """Runs a reverse proxy that passes on requests below a path, and strips the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.startswith(f"{folder}/"):
                return self.send_error(404)
            behind = http.client.HTTPConnection("127.0.0.1", port)
            behind.request("GET", self.path.removeprefix(folder), headers={"Host": self.headers["Host"]})
            answer = behind.getresponse()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(answer.read())
            behind.close()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}{folder}/"
        server.shutdown()


def look(browser, *, width=1280, height=900, theme="light", motion="no-preference"):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait(browser, condition):
    return WebDriverWait(browser, 15, 0.05).until(lambda _: condition())


def open_page(browser, url):
    """Opens a page and waits until it displays results or an error."""
    browser.get(url)
    wait(browser, lambda: find_all(browser, ".cib-card, .cib-notice:not(:empty)"))
    wait(browser, lambda: not busy(browser))


def busy(browser):
    return bool(find_all(browser, ".cib-stage.busy"))


def asked(browser):
    """Returns the parameters of the URL."""
    return dict(re.findall(r"[?&](\w+)=([^&#]*)", browser.current_url))


def results(browser):
    """Returns (distance, id) of each result."""
    return [
        tuple(pair)
        for pair in browser.execute_script(
            "return [...document.querySelectorAll('.cib-card')].map((card) =>"
            " [parseInt(card.querySelector('.cib-distance').textContent), card.dataset.id])"
        )
    ]


def drawn(element):
    """Returns the bits of a drawing as a string, and the places of those that are marked as different."""
    script = "return [...arguments[0].querySelectorAll('svg rect')].map((bit) => bit.getAttribute('class').split(' '))"
    classes = element.parent.execute_script(script, element)
    word = "".join("1" if "on" in names else "0" for names in classes)
    return word, [place for place, names in enumerate(classes) if "apart" in names]


def requests(browser):
    """Returns the requests since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"]["request"] for message in messages if message["method"] == "Network.requestWillBeSent"]


def loop(code, codes, k, without=None):
    """Returns (distance, number) of the nearest codes, in plain Python."""
    query = int(code, 16)
    pairs = [((query ^ int(row.tobytes().hex(), 16)).bit_count(), number) for number, row in enumerate(codes)]
    return [pair for pair in sorted(pairs) if pair[1] != without][:k]


def jpeg(seed, size):
    """Returns a photo of a few large spots."""
    spots = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(spots).resize(size, PIL.Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


class Site(NamedTuple):
    """A collection that is served."""

    url: str
    collection: Any

    def of(self, number, k):
        """Returns the URL of the search from a photo."""
        return f"{self.url}?id={self.photo(number).id}&k={k}"

    def photo(self, number):
        return self.collection.photos([number])[0]

    def code(self, id):
        return self.collection.codes[self.collection.number_of(id)].tobytes().hex()

    def check(self, browser, k):
        """Waits for k results, checks them against a plain loop, and returns the parameters of the URL."""
        wait(browser, lambda: asked(browser).get("k") == str(k) and len(results(browser)) == k)
        wait(browser, lambda: not busy(browser))
        words = asked(browser)
        id = words.get("id")
        own = None if id is None else self.collection.number_of(id)
        nearest = loop(words.get("code") or self.code(id), self.collection.codes, k, own)
        assert results(browser) == [(distance, self.photo(number).id) for distance, number in nearest]
        return words


LOW_CONTRAST = """
const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const light = (color) => {
  const [r, g, b] = parse(color).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (parse(color).length === 3 || parse(color)[3] === 1) return color;
  }
  return "rgb(255, 255, 255)";
};
const isWord = (node) => node.nodeType === 3 && node.data.trim();
const hasWords = (node) => node.value || [...node.childNodes].some(isWord);
return [...document.querySelectorAll("#cib-page *")].flatMap((node) => {
  if (!hasWords(node) || !node.checkVisibility({ visibilityProperty: true })) return [];
  const [more, less] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
  const ratio = (more + 0.05) / (less + 0.05);
  return ratio < 4.5 ? [`${ratio.toFixed(2)} ${node.outerHTML.slice(0, 120)}`] : [];
});
"""
"""Returns text of which the contrast is less than 4.5 to 1 (WCAG 2.2, 1.4.3)."""

MOVING = """
return [...document.querySelectorAll("#cib-page, #cib-page *")].filter((node) => [null, "::after"].some((part) => {
  const style = getComputedStyle(node, part);
  return style.animationName !== "none" || style.transitionDuration.split(",").some((time) => parseFloat(time) > 0);
})).map((node) => node.outerHTML);
"""

UNNAMED = """
const all = document.querySelectorAll("#cib-page :is(img:not([hidden]), a, button, input)");
const name = (node) => node.alt || node.ariaLabel || node.textContent.trim();
return [...all].filter((node) => !name(node)).map((node) => node.outerHTML);
"""

SMALL = """
const all = document.querySelectorAll("#cib-page :is(a:not(.cib-skip), button, input:not([hidden]))");
return [...all].filter((node) => node.getBoundingClientRect().height < 40).map((node) => node.outerHTML);
"""

CARRY = """
const [bytes, way] = arguments;
const carried = new DataTransfer();
carried.items.add(new File([new Uint8Array(bytes)], "carried.jpg", { type: "image/jpeg" }));
const target = document.querySelector(".cib-results");
if (way === "paste") {
  target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));
} else {
  for (const kind of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true }));
  }
}
"""
"""Drops or pastes a file onto the page."""
