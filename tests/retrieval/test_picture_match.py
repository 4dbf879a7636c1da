"""Copies of generated scenes, notes and icons against other pictures; hashes against a transform written out."""

import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest

from cib_jax.retrieval import picture_match
from cib_jax.retrieval.picture_match import ORIENTATIONS, Picture, is_copy, is_framed, orient, perceptual_hashes
from tests.data.pictures import scene


def note(text):
    """Returns a white page with a few words."""
    image = PIL.Image.new("RGB", (310, 440), "white")
    pen = PIL.ImageDraw.Draw(image)
    for line, words in enumerate(["Invoice", text, f"Total {text[::-1]}"]):
        pen.text((30, 60 + 90 * line), words, fill="black", font_size=18)
    return image


def numbered(seed):
    return note(f"{4711 + 37 * seed} pieces")


def icon(seed):
    rng = np.random.default_rng(seed)
    image = PIL.Image.new("RGB", (256, 256), "white")
    PIL.ImageDraw.Draw(image).polygon([tuple(point) for point in rng.integers(8, 248, (5, 2)).tolist()], fill="black")
    return image


def horizon(seed):
    rng = np.random.default_rng(seed)
    image = PIL.Image.new("RGB", (300, 200), tuple(rng.integers(90, 256, 3).tolist()))
    image.paste(tuple(rng.integers(0, 120, 3).tolist()), (0, 100, 300, 200))
    return image


def jpeg(image, quality=80):
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return PIL.Image.open(file).convert("RGB")


def stamped(image):
    image = image.copy()
    PIL.ImageDraw.Draw(image).text((260, 270), "2024 08 17", fill="orange", font_size=18)
    return image


def marked(image):
    layer = PIL.Image.new("RGBA", image.size)
    PIL.ImageDraw.Draw(layer).text((40, 120), "SAMPLE PHOTO", fill=(255, 255, 255, 110), font_size=45)
    return PIL.Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def captioned(image):
    framed = PIL.ImageOps.expand(image, (0, 0, 0, 40), "white")
    PIL.ImageDraw.Draw(framed).text((10, 305), "On a Monday", fill="black", font_size=26)
    return framed


def picture(image):
    pixels = np.asarray(image)
    return Picture(lambda: pixels, perceptual_hashes(pixels))


CHANGES = {
    "compressed": lambda image: jpeg(image, 10),
    "half": lambda image: image.resize((200, 150)),
    "quarter": lambda image: image.resize((100, 75)),
    "brighter": lambda image: PIL.ImageEnhance.Brightness(image).enhance(1.3),
    "contrast": lambda image: PIL.ImageEnhance.Contrast(image).enhance(1.3),
    "blurred": lambda image: image.filter(PIL.ImageFilter.GaussianBlur(2)),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "stamped": stamped,
    "marked": marked,
    "captioned": captioned,
    "cropped": lambda image: image.crop((40, 30, 360, 270)),
    "corner": lambda image: image.crop((0, 0, 300, 240)),
    "framed": lambda image: PIL.ImageOps.expand(image, 20, "white"),
    "tilted": lambda image: image.rotate(2, PIL.Image.Resampling.BICUBIC),
    "mirrored": PIL.ImageOps.mirror,
    "turned": lambda image: image.transpose(PIL.Image.Transpose.ROTATE_90),
    "upside down": lambda image: image.transpose(PIL.Image.Transpose.ROTATE_180),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_one_and_another_picture_is_not(change):
    for seed in range(2):
        original, copy = picture(scene(seed)), picture(jpeg(CHANGES[change](scene(seed)), 90))
        assert is_copy(original, copy) and is_copy(copy, original), seed
        assert not is_copy(picture(scene(seed + 100)), copy)


def test_a_brighter_copy_of_a_small_thing_against_the_sky_is_one():
    def against_the_sky(seed):
        sky = PIL.Image.linear_gradient("L").resize((400, 300)).point(lambda level: 60 + level // 3).convert("RGB")
        sky.paste(scene(seed, 90, 70), (150, 170))
        return sky

    brighter = picture(jpeg(PIL.ImageEnhance.Brightness(against_the_sky(0)).enhance(1.3)))
    assert is_copy(picture(against_the_sky(0)), brighter)
    assert not is_copy(picture(against_the_sky(1)), brighter)


def test_a_blurred_copy_of_an_evening_is_one():
    """It has few corners, and all of its finest details are gone."""

    def evening(top):
        levels = np.linspace(40, 200, 300)[:, None, None] * np.array([1.0, 0.8, 0.6])
        image = PIL.Image.fromarray(np.broadcast_to(levels, (300, 400, 3)).astype(np.uint8))
        pen = PIL.ImageDraw.Draw(image)
        pen.polygon([(0, 300), (top, 120), (400, 300)], fill=(120, 100, 80))
        for x in range(150, 250, 16):
            pen.line((x, 290, x, 296), fill=(255, 255, 255))
        return image

    blurred = picture(evening(200).filter(PIL.ImageFilter.GaussianBlur(2)))
    assert is_copy(picture(evening(200)), blurred)
    assert not is_copy(picture(evening(150)), blurred)


@pytest.mark.parametrize("change", ["captioned", "framed", "framed in black", "on a telephone"])
def test_a_picture_with_a_border_or_a_caption_is_framed(change):
    def on_a_telephone(image):
        screen = PIL.Image.new("RGB", (400, 700), (18, 18, 18))
        screen.paste(image, (0, 200))
        PIL.ImageDraw.Draw(screen).text((30, 640), "Reply  Share", fill="white", font_size=26)
        return screen

    changes = CHANGES | {
        "framed in black": lambda image: PIL.ImageOps.expand(image, 20, "black"),
        "on a telephone": on_a_telephone,
    }
    for seed in range(3):
        original, copy = picture(scene(seed)), picture(jpeg(changes[change](scene(seed)), 90))
        assert is_framed(copy, original) and not is_framed(original, copy), seed
        small = picture(scene(seed).resize((200, 150)))
        assert is_framed(copy, small) and not is_framed(original, small)
        assert not is_framed(copy, picture(scene(seed + 100)))


def test_a_picture_is_not_framed_beside_its_crop():
    """Nor a thing on white, of which the crop cuts off only white."""
    thing = PIL.Image.new("RGB", (480, 360), "white")
    thing.paste(scene(1, 240, 180), (120, 90))
    for image, box in [(scene(0), (40, 30, 360, 270)), (scene(0), (0, 0, 400, 240)), (thing, (80, 60, 400, 300))]:
        whole, crop = picture(image), picture(image.crop(box))
        assert picture_match.align(whole, crop) is not None
        assert not is_framed(whole, crop) and not is_framed(crop, whole)


def test_two_photos_that_share_a_corner_are_not_copies():
    """The quarter of each that the other shows agrees to the level."""
    whole = scene(0, 600, 450)
    one, other = whole.crop((0, 0, 400, 300)), whole.crop((200, 150, 600, 450))
    assert picture_match.align(picture(one), picture(other)) is not None
    assert not is_copy(picture(one), picture(other))


@pytest.mark.parametrize("make", [numbered, icon, horizon])
def test_pictures_with_little_to_see_are_copies_only_if_all_of_it_agrees(make):
    seen = [picture(make(seed)) for seed in range(5)]
    for number, one in enumerate(seen):
        saved = jpeg(make(number))
        assert is_copy(one, picture(saved)) and is_copy(
            one, picture(saved.resize((saved.width // 2, saved.height // 2)))
        )
        assert not any(is_copy(one, other) for other in seen[:number])


def test_flat_pictures_are_copies_if_their_colors_are_equal():
    flat = [picture(PIL.Image.new("RGB", (60, 40), color)) for color in ("#808080", "#818180", "#a09080", "black")]
    assert is_copy(flat[0], flat[1]) and not any(is_copy(flat[0], other) for other in flat[2:])


def test_two_night_skies_with_few_stars_are_not_copies():
    def sky(seed):
        rng = np.random.default_rng(seed)
        image = np.full((300, 400, 3), 12, np.uint8)
        image[rng.integers(0, 300, 40), rng.integers(0, 400, 40)] = 200
        return picture(jpeg(PIL.Image.fromarray(image).resize((200, 150)), 85))

    assert not any(is_copy(sky(0), sky(seed)) for seed in range(1, 4))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2), (480, 8)])
def test_any_shape_can_be_compared(size):
    thin = picture(scene(0, *size)) if min(size) > 1 else picture(PIL.Image.new("RGB", size, "red"))
    assert is_copy(thin, thin) and not is_copy(thin, picture(scene(1)))


def test_an_alignment_is_the_map_by_which_a_copy_was_made():
    """A crop that starts at (60, 40) and is then halved: (x, y) goes to ((x - 60) / 2, (y - 40) / 2), centers kept."""
    image = scene(5)
    cropped = image.crop((60, 40, 360, 280)).resize((150, 120), PIL.Image.Resampling.BOX)
    found = picture_match.align(picture(image), picture(cropped))
    expected = [[0.5, 0, -30.25], [0, 0.5, -20.25]]
    corners = np.array([[60, 360, 60], [40, 40, 280], [1, 1, 1]])
    assert np.abs(found @ corners - expected @ corners).max() < 1
    assert picture_match.align(picture(image), picture(scene(6))) is None


def test_hashes_are_signs_of_a_cosine_transform_in_every_orientation():
    image = scene(3, 32, 32)
    hashes = perceptual_hashes(np.asarray(image))
    frequencies = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)
    gray = np.asarray(image.convert("L"), np.float64)
    turned = [gray, gray[::-1], gray[:, ::-1], gray[::-1, ::-1]]
    for number, levels in enumerate(
        [*turned, *(each.T for each in (gray, gray[:, ::-1], gray[::-1], gray[::-1, ::-1]))]
    ):
        low = frequencies @ levels @ frequencies.T
        clear = np.abs(low - np.median(low)) > 1e-6
        bits = np.unpackbits(hashes[number]).reshape(8, 8).astype(bool)
        assert np.array_equal(bits[clear], (low > np.median(low))[clear]), number


def test_an_orientation_is_that_of_its_hash():
    image = np.asarray(scene(4, 32, 32))
    hashes = perceptual_hashes(image)
    for number in range(ORIENTATIONS):
        own = perceptual_hashes(np.ascontiguousarray(orient(image, number)))[0]
        assert np.bitwise_count(own ^ hashes[number]).sum() <= 2, "the median's own bits may go either way"
