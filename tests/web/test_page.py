"""The search page in headless Chromium: by mouse, keyboard and phone, with links and with files."""

import dataclasses
import functools
import re

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cib_jax.data.photos import decode_with_thumbnail
from tests.web import browsing, fake
from tests.web.browsing import Site, asked, drawn, find, find_all, look, results, wait
from tests.web.conftest import OPEN

pytestmark = pytest.mark.skipif(
    not (browsing.CHROMIUM and browsing.DRIVER), reason="no chromium or chromedriver; apt-get install chromium-driver"
)

MARKUP = "<img src=x onerror=alert(1)>.jpg"
TEMPLATE = "trips/${alert(2)} {{7*7}} `x`.jpg"
SETTINGS = dataclasses.replace(OPEN, photo_mb=1)
SLIDER = "#cib-how-many input[type=range]"
NAME = "#cib-query-name"


def collection_of(root, count):
    sizes = [(320, 240), (240, 320), (300, 300), (400, 130)]
    for number in range(count):
        path = root / {3: MARKUP, 4: TEMPLATE}.get(number, f"trips/{number % 5}/photo {number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(browsing.jpeg(number, sizes[number % 4]))
    return fake.FakeCollection(root)


@pytest.fixture(scope="module")
def page():
    """The module, with which Gradio is imported, for seconds that the worker is spared that does not run this file."""
    from cib_jax.web import page

    return page


@pytest.fixture(scope="module")
def site(running, page, tmp_path_factory):
    collection = collection_of(tmp_path_factory.mktemp("collection"), 48)
    with running(collection, SETTINGS, page=functools.partial(page.mount, settings=SETTINGS)) as served:
        yield Site(f"http://127.0.0.1:{served.port}/", collection)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browsing.chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    look(chromium)
    return chromium


def notice(browser):
    return wait(browser, lambda: find(browser, ".cib-notice").text)


def send(browser, path):
    find(browser, "#cib-file").send_keys(str(path))


def photo_file(folder, seed):
    (folder / "new.jpg").write_bytes(browsing.jpeg(seed, (64, 48)))
    return folder / "new.jpg"


def test_opens_with_a_photo_drawn_by_chance_and_its_nearest(browser, site):
    browsing.open_page(browser, site.url)
    seen = [site.check(browser, 20)["id"]]
    assert find(browser, NAME).text.replace("\n", "") == site.photo(site.collection.number_of(seen[0])).path
    for _ in range(3):
        find(browser, "#cib-another").click()
        wait(browser, lambda: asked(browser)["id"] != seen[-1])
        seen.append(site.check(browser, 20)["id"])
    assert len(set(seen)) > 2
    browser.back()
    wait(browser, lambda: asked(browser)["id"] == seen[-2])
    site.check(browser, 20)


def test_bits_are_drawn_as_they_are(browser, site):
    browsing.open_page(browser, site.of(11, 2))
    code = site.code(site.photo(11).id)
    word = f"{int(code, 16):064b}"
    assert drawn(find(browser, ".cib-bits")) == (word, [])
    assert find(browser, ".cib-hex").text.replace(" ", "") == code
    for card in find_all(browser, ".cib-card"):
        other = f"{int(site.code(card.get_attribute('data-id')), 16):064b}"
        apart = [place for place in range(64) if word[place] != other[place]]
        assert drawn(card) == (other, apart)
        label = find(card, "svg").get_attribute("aria-label")
        assert [int(place) - 1 for place in re.findall(r"\d+", label)] == apart
        # Color is not the only distinction: bits that differ are larger.
        width = (
            "return [...arguments[0].querySelectorAll(arguments[1])].map((bit) => bit.getBoundingClientRect().width)"
        )
        smallest = min(browser.execute_script(width, card, "rect.apart"))
        assert smallest > 1.5 * max(browser.execute_script(width, card, "rect:not(.apart)"))
        # The query's own code has the same marks while the pointer is over the result.
        webdriver.ActionChains(browser).move_to_element(card).perform()
        wait(browser, lambda apart=apart: drawn(find(browser, ".cib-bits")) == (word, apart))


def test_a_result_is_searched_on_from_and_back_returns(browser, site):
    browsing.open_page(browser, site.of(20, 6))
    second = results(browser)[1][1]
    find(browser, f'[data-id="{second}"] .cib-pick').click()
    wait(browser, lambda: asked(browser)["id"] == second)
    site.check(browser, 6)
    assert browser.switch_to.active_element == find(browser, NAME)
    browser.back()
    wait(browser, lambda: asked(browser)["id"] == site.photo(20).id)
    site.check(browser, 6)
    browser.forward()
    wait(browser, lambda: asked(browser)["id"] == second)
    site.check(browser, 6)


def test_the_slider_says_how_many_and_follows_the_address(browser, site):
    browsing.open_page(browser, site.of(5, 9))
    slider = find(browser, SLIDER)
    wait(browser, lambda: slider.get_attribute("value") == "9")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    site.check(browser, 11)
    number = find(browser, "#cib-how-many input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("20")  # the value of the slider before the URL was read
    site.check(browser, 20)
    find(browser, ".cib-pick").click()
    wait(browser, lambda: asked(browser)["id"] != site.photo(5).id)
    slider.send_keys(Keys.ARROW_RIGHT)
    site.check(browser, 21)
    browser.back()
    site.check(browser, 20)
    wait(browser, lambda: slider.get_attribute("value") == "20")


def test_a_photo_is_sent_to_the_search_only_and_displayed_from_the_browsers_copy(browser, site, tmp_path):
    browsing.open_page(browser, site.of(8, 7))
    browser.get_log("performance")
    photo = photo_file(tmp_path, 1000)
    send(browser, photo)
    wait(browser, lambda: "code" in asked(browser))
    words = site.check(browser, 7)
    square = decode_with_thumbnail(photo, fake.SIDE).square
    assert words["code"] == site.collection.encode(square[None])[0].tobytes().hex()
    assert find(browser, ".cib-photo").get_attribute("src").startswith("blob:")
    wait(browser, lambda: find(browser, ".cib-size").text == "64 × 48")
    # Another search, and back: the browser still has the photo.
    find(browser, ".cib-pick").click()
    wait(browser, lambda: "id" in asked(browser))
    browser.back()
    wait(browser, lambda: "code" in asked(browser))
    site.check(browser, 7)
    assert find(browser, NAME).text == "new.jpg"
    assert find(browser, ".cib-photo").get_attribute("src").startswith("blob:")
    find(browser, SLIDER).send_keys(Keys.ARROW_RIGHT)
    site.check(browser, 8)
    posts = [request["url"] for request in browsing.requests(browser) if request["method"] != "GET"]
    assert posts == [f"{site.url}search?k=7"], "it was sent elsewhere, or again"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(browser, site, way):
    browsing.open_page(browser, site.of(8, 3))
    content = browsing.jpeg({"drop": 1001, "paste": 1002}[way], (40, 40))
    browser.execute_script(browsing.CARRY, list(content), way)
    wait(browser, lambda: "code" in asked(browser))
    square = decode_with_thumbnail(content, fake.SIDE).square
    assert site.check(browser, 3)["code"] == site.collection.encode(square[None])[0].tobytes().hex()
    assert find(browser, NAME).text == "carried.jpg"
    assert not find(browser, ".cib-drop").is_displayed()


def test_a_link_opens_the_same_in_a_fresh_tab(browser, site, tmp_path):
    browsing.open_page(browser, site.of(8, 5))
    send(browser, photo_file(tmp_path, 1003))
    wait(browser, lambda: "code" in asked(browser))
    site.check(browser, 5)
    link, shown, old = browser.current_url, results(browser), browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        look(browser)
        browser.get(link)
        site.check(browser, 5)
        assert (results(browser), browser.current_url) == (shown, link)
        assert "only its code" in find(browser, ".cib-gone").text
        assert not find(browser, ".cib-photo").is_displayed()
    finally:
        browser.close()
        browser.switch_to.window(old)


def test_all_can_be_done_by_keyboard(browser, site):
    browsing.open_page(browser, site.of(30, 3))

    def tab_to(selector, most):
        for _ in range(most):
            webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
            focused = browser.switch_to.active_element
            shown = focused.value_of_css_property("outline-style"), focused.value_of_css_property("box-shadow")
            assert shown != ("none", "none"), focused.get_attribute("outerHTML")
            if browser.execute_script("return arguments[0].matches(arguments[1])", focused, selector):
                return focused
        raise AssertionError(f"{selector} is not reached by {most} tabs")

    tab_to(".cib-skip", 1)
    tab_to("#cib-choose", 1)
    tab_to("#cib-another", 1).send_keys(Keys.ENTER)
    wait(browser, lambda: asked(browser)["id"] != site.photo(30).id)
    site.check(browser, 3)
    for key in (Keys.ENTER, Keys.SPACE):
        picked = tab_to(".cib-pick", 8)
        id = picked.find_element(By.XPATH, "./..").get_attribute("data-id")
        picked.send_keys(key)
        wait(browser, lambda id=id: asked(browser)["id"] == id)
        site.check(browser, 3)
    larger = tab_to(".cib-query .cib-larger", 1)
    assert larger.get_attribute("href") == f"{site.url}image/{asked(browser)['id']}"
    # A screen reader gets the number of results, and a name for each photo and control.
    assert re.fullmatch(r"3 nearest, \d+ to \d+ of 64 bits apart", find(browser, "[role=status]").text)
    assert browser.execute_script(browsing.UNNAMED) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_and_fit_a_phone(browser, site, theme):
    look(browser, width=360, height=740, theme=theme)
    browsing.open_page(browser, site.of(3, 12))
    assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert browser.execute_script(browsing.SMALL) == []
    assert browser.execute_script(browsing.LOW_CONTRAST) == []
    assert find(browser, "body").get_attribute("class").split().count("dark") == (theme == "dark")


def test_nothing_moves_where_that_is_asked_for(browser, site):
    look(browser, motion="reduce")
    browsing.open_page(browser, site.url)
    browser.execute_script("document.querySelector('.cib-stage').classList.add('busy')")
    assert browser.execute_script(browsing.MOVING) == []


@pytest.mark.parametrize("path", [MARKUP, TEMPLATE])
def test_a_files_name_is_only_text(browser, site, path):
    browser.get_log("browser")
    photos = site.collection.photos(range(len(site.collection)))
    number = [photo.path for photo in photos].index(path)
    browsing.open_page(browser, site.of(number, 40))
    assert find(browser, NAME).text.replace("\n", "") == path
    assert path in browser.title
    browsing.open_page(browser, site.of(9, 47))
    name = find(browser, f'[data-id="{site.photo(number).id}"] .cib-path')
    assert name.get_attribute("textContent") == path
    assert not find_all(browser, "img[onerror]")
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_errors_are_told_in_the_page(browser, site, tmp_path):
    browsing.open_page(browser, site.of(8, 5))
    shown = results(browser)
    browser.get_log("performance")
    (tmp_path / "large.jpg").write_bytes(b"\xff\xd8" + bytes(1_200_000))
    send(browser, tmp_path / "large.jpg")
    assert notice(browser) == "large.jpg has 1.2 MB; a photo may have at most 1 MB."
    assert browsing.requests(browser) == [], "it was sent all the same"
    assert results(browser) == shown, "what was shown before is gone"
    (tmp_path / "words.txt").write_text("no photo")
    send(browser, tmp_path / "words.txt")
    wait(browser, lambda: notice(browser) == "words.txt is not a photo.")
    (tmp_path / "words.jpg").write_text("nor this")
    send(browser, tmp_path / "words.jpg")
    wait(browser, lambda: not notice(browser).startswith("words.txt"))
    assert any(request["method"] == "POST" for request in browsing.requests(browser))
    find(browser, "#cib-another").click()
    wait(browser, lambda: not find(browser, ".cib-notice").text)
    browsing.open_page(browser, f"{site.url}?id=0123456789abcdef&k=5")
    assert notice(browser) == "No photo has this id."
    assert results(browser) == []


def test_a_photo_without_its_file_can_still_be_searched_with(running, page, browser, tmp_path):
    # Not the collection of the other tests, of which the browser may have cached photos.
    collection = collection_of(tmp_path, 6)
    with running(collection, SETTINGS, page=page.mount) as served:
        site = Site(f"http://127.0.0.1:{served.port}/", collection)
        (tmp_path / site.photo(2).path).unlink()
        browsing.open_page(browser, site.of(2, 4))
        site.check(browser, 4)
        wait(browser, lambda: "thumbnail" in find(browser, ".cib-gone").text)
        assert find(browser, ".cib-photo").get_attribute("src").endswith(f"/thumbnail/{site.photo(2).id}")


def test_works_below_a_path_of_a_reverse_proxy(running, page, browser, tmp_path):
    collection = collection_of(tmp_path, 3)
    with (
        running(collection, SETTINGS, page=functools.partial(page.mount, root_path="/find")) as served,
        browsing.proxy("/find", served.port) as url,
    ):
        browsing.open_page(browser, f"{url}?k=2")
        first = Site(url, collection).check(browser, 2)["id"]
        find(browser, ".cib-pick").click()
        wait(browser, lambda: asked(browser)["id"] != first)
        Site(url, collection).check(browser, 2)
        assert browser.current_url.startswith(f"{url}?id=")
        loaded = "return [...document.images].every((image) => image.complete && image.naturalWidth)"
        wait(browser, lambda: browser.execute_script(loaded))
        # The theme of Gradio was loaded, which the proxy has only below its path.
        assert find(browser, "#cib-choose").value_of_css_property("background-color") == "rgba(11, 95, 149, 1)"


def test_errors_of_the_server_are_displayed(running, page, browser, tmp_path):
    settings = dataclasses.replace(OPEN, searches=1)
    with running(fake.FakeCollection(tmp_path), settings, page=page.mount) as served:
        browsing.open_page(browser, f"http://127.0.0.1:{served.port}/")
        assert "no photo yet" in notice(browser)
        find(browser, "#cib-another").click()
        wait(browser, lambda: notice(browser).startswith("Too many requests"))


def test_nothing_is_requested_from_another_server_or_from_gradios_functions(browser, site):
    browser.get("about:blank")
    browser.get_log("performance")
    browsing.open_page(browser, site.url)
    find(browser, "#cib-another").click()
    find(browser, SLIDER).send_keys(Keys.ARROW_RIGHT)
    site.check(browser, 21)
    urls = {request["url"] for request in browsing.requests(browser)}
    assert any(url.startswith(f"{site.url}search") for url in urls)
    assert [url for url in urls if not url.startswith((site.url, "data:", "blob:"))] == []
    assert [url for url in urls if "gradio_api" in url] == []
