"""Changed copies of photos that `cib.find_duplicates` finds, beside the DCT hashes of imagehash and imagededup.

`python -m benchmarks.copies PHOTOS --photos=1000` draws photos of a folder without near-equal ones, writes each with
one changed copy, indexes both, and prints for each change the share of copies that share a group with their original,
that of copies within 10 of 64 bits of a DCT hash, and the joins: groups with different originals, which are listed to
be looked at. `--encoder=FOLDER` takes a saved Hasher instead of one learned from the photos. `--false=FOLDER` also
counts the groups among pictures that are all different, a kind in each subfolder, and the pictures that are found again
as JPEG and at half the size. `--search` measures instead how often a changed copy finds its original first, and among
the first ten: by codes, re-ranked, and by exact features; `--seconds=10000` the time for so many photos.
"""

import argparse
import io
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageFont
import PIL.ImageOps
import rich.console
from PIL.Image import Image

import cib_jax as cib
from benchmarks import measuring
from cib_jax.data.photos import decode
from cib_jax.models.encoder import plain_features

TIMED = 20  # queries
QUIET = rich.console.Console(quiet=True)


def jpeg(image: Image, quality: int = 90) -> bytes:
    """Returns an image as the bytes of a JPEG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def crop(share: float) -> Callable[[Image], Image]:
    """Returns a function that cuts off a share of the width and of the height, half of it on each side."""

    def cut(image: Image) -> Image:
        x, y = round(image.width * share / 2), round(image.height * share / 2)
        return image.crop((x, y, image.width - x, image.height - y))

    return cut


def border(share: float, color: str) -> Callable[[Image], Image]:
    """Returns a function that adds a frame as wide as a share of the longer side."""
    return lambda image: PIL.ImageOps.expand(image, max(1, round(share * max(image.size))), color)


def resize(factor: float) -> Callable[[Image], Image]:
    """Returns a function that resizes by a factor."""
    return lambda image: image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def write(image: Image, text: str, x: float, y: float, size: float, color: tuple[int, ...]) -> Image:
    """Returns an image with text at a place, and of a size, given as shares of its width and height."""
    layer = PIL.Image.new("RGBA", image.size, (0, 0, 0, 0))
    font = PIL.ImageFont.load_default(size=max(10, round(size * image.height)))
    PIL.ImageDraw.Draw(layer).text((x * image.width, y * image.height), text, fill=color, font=font)
    return PIL.Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def caption(image: Image) -> Image:
    """Returns an image with a bar of text below it."""
    taller = PIL.ImageOps.expand(image, (0, 0, 0, max(12, image.height // 8)), "white")
    return write(taller, "When you see it on a Monday", 0.03, 0.9, 0.06, (0, 0, 0, 255))


def screenshot(image: Image) -> Image:
    """Returns an image as a telephone shows it."""
    screen = PIL.Image.new("RGB", (540, 960), (18, 18, 18))
    shown = image.resize((540, min(860, round(image.height * 540 / image.width))))
    screen.paste(shown, (0, (960 - shown.height) // 2))
    screen = write(screen, "12:41", 0.04, 0.01, 0.025, (255, 255, 255, 255))
    return write(screen, "Reply     Share     More", 0.08, 0.94, 0.025, (255, 255, 255, 255))


CHANGES: dict[str, Callable[[Image], Image | bytes]] = {
    "JPEG q30": lambda image: jpeg(image, 30),
    "JPEG q10": lambda image: jpeg(image, 10),
    "half size": resize(0.5),
    "quarter size": resize(0.25),
    "brightness +30%": lambda image: PIL.ImageEnhance.Brightness(image).enhance(1.3),
    "contrast +30%": lambda image: PIL.ImageEnhance.Contrast(image).enhance(1.3),
    "blur, 2 pixels": lambda image: image.filter(PIL.ImageFilter.GaussianBlur(2)),
    "gray": lambda image: image.convert("L"),
    "date stamp": lambda image: write(image, "2024 08 17", 0.68, 0.92, 0.055, (255, 140, 0, 255)),
    "watermark": lambda image: write(image, "SAMPLE PHOTO", 0.1, 0.42, 0.15, (255, 255, 255, 110)),
    "caption bar": caption,
    "crop 5%": crop(0.05),
    "crop 10%": crop(0.1),
    "crop 20%": crop(0.2),
    "crop 40%": crop(0.4),
    "border 5%": border(0.05, "white"),
    "black border 5%": border(0.05, "black"),
    "turned 2°": lambda image: image.rotate(2, PIL.Image.Resampling.BICUBIC),
    "mirrored": PIL.ImageOps.mirror,
    "turned 90°": lambda image: image.transpose(PIL.Image.Transpose.ROTATE_90),
    "screenshot": screenshot,
}


def dct_hash(image: Image) -> int:
    """Returns imagehash's DCT hash as a number."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def dedup_hash(image: Image) -> int:
    """Returns imagededup's DCT hash as a number."""
    from imagededup.methods import PHash  # needs torch, for networks that are not used here

    return int(PHash(verbose=False).encode_image(image_array=np.asarray(image)), 16)


def draw(folder: pathlib.Path, count: int, seed: int) -> list[pathlib.Path]:
    """Returns photos in random order without those that the DCT hash calls equal to another."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    order = np.random.default_rng(seed).permutation(len(paths))
    kept: dict[int, pathlib.Path] = {}
    for number in order:
        if len(kept) == count:
            break
        own = dct_hash(PIL.Image.open(paths[number]).convert("RGB"))
        if all((own ^ other).bit_count() > 10 for other in kept):
            kept[own] = paths[number]
    return list(kept.values())


def groups(
    index: pathlib.Path | str, folder: pathlib.Path | str, encoder: pathlib.Path
) -> tuple[list[list[str]], float, float]:
    """Returns groups of paths, seconds for making or updating the index, and seconds for the search for copies."""
    begun = time.perf_counter()
    cib.index_photos(index, folder, workdir=encoder, console=QUIET)
    indexed = time.perf_counter()
    found = cib.find_duplicates(index, console=QUIET)
    return [[photo.path for _, photo in group] for group in found], indexed - begun, time.perf_counter() - indexed


def measure_changes(names: list[str], photos: list[pathlib.Path], encoder: pathlib.Path, place: str) -> None:
    """Prints a row for each change."""
    folder = pathlib.Path(place, "changed")
    folder.mkdir()
    originals = []
    for number, path in enumerate(photos):
        shutil.copy(path, folder / f"{number:05}.jpg")
        image = PIL.Image.open(path).convert("RGB")
        originals.append((dct_hash(image), dedup_hash(image)))
    rows = []
    for name in names:
        near = np.zeros(2)
        for number, path in enumerate(photos):
            changed = CHANGES[name](PIL.Image.open(path).convert("RGB"))
            content = changed if isinstance(changed, bytes) else jpeg(changed)
            (folder / f"{number:05}_copy.jpg").write_bytes(content)
            image = PIL.Image.open(io.BytesIO(content)).convert("RGB")
            hashes = dct_hash(image), dedup_hash(image)
            near += [(a ^ b).bit_count() <= 10 for a, b in zip(hashes, originals[number], strict=True)]
        found, index_seconds, seconds = groups(f"{place}/index of changed", folder, encoder)
        owners = [{path[:5] for path in group} for group in found]
        right = sum(map(len, found)) - sum(map(len, owners))
        joined = [group for group, some in zip(found, owners, strict=True) if len(some) > 1]
        shares = [f"{100 * count / len(photos):.1f}" for count in (right, *near)]
        joins = sum(len(some) - 1 for some in owners)
        rows.append([name, *shares, f"{joins}", f"{index_seconds:.0f}", f"{seconds:.0f}"])
        print(" | ".join(rows[-1]), flush=True)
        for group in joined:
            print("  ", *group, *sorted({str(photos[int(path[:5])]) for path in group}))
    columns = ["change", "found, %", "imagehash, %", "imagededup, %", "joins", "index, s", "copies, s"]
    measuring.print_table(columns, rows)


def measure_seconds(count: int, folder: pathlib.Path, encoder: pathlib.Path) -> None:
    """Prints the seconds for photos of which no two are copies but by chance: small parts of those of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            image = PIL.Image.open(paths[number % len(paths)]).convert("RGB")
            width, height = image.width * 6 // 10, image.height * 6 // 10
            x, y = generator.integers(0, [image.width - width + 1, image.height - height + 1]).tolist()
            part = image.crop((x, y, x + width, y + height)).resize((640, 480))
            pathlib.Path(place, f"{number:05}.jpg").write_bytes(jpeg(part))
        begun = time.perf_counter()
        for path in pathlib.Path(place).iterdir():
            dct_hash(PIL.Image.open(path))
        hashed = time.perf_counter() - begun
        found, index_seconds, seconds = groups(f"{place}/index", place, encoder)
    rows = [[f"{count:,}", f"{hashed:.0f}", f"{index_seconds:.0f}", f"{seconds:.0f}", str(len(found))]]
    measuring.print_table(["photos", "DCT hash, one core, s", "index, s", "copies, s", "groups"], rows)


def measure_search(names: list[str], photos: list[pathlib.Path], encoder: pathlib.Path) -> None:
    """Prints how often a changed copy finds its original first, and among the first ten."""
    hasher = cib.Hasher.load(encoder)
    place = tempfile.mkdtemp()
    try:
        for number, path in enumerate(photos):
            shutil.copy(path, f"{place}/{number:05}.jpg")
        cib.index_photos(f"{place}/index", place, workdir=encoder, console=QUIET)
        collection = cib.Collection.open(f"{place}/index")
        names_of = [photo.path for photo in collection.photos(range(len(collection)), thumbnails=False)]
        squares = np.stack([decode(f"{place}/{name}", hasher.side) for name in names_of])
        features = exact_features(hasher, squares)
        rows = []
        for name in names:
            changed = [CHANGES[name](PIL.Image.open(f"{place}/{each}").convert("RGB")) for each in names_of]
            contents = [image if isinstance(image, bytes) else jpeg(image) for image in changed]
            queries = np.stack([decode(content, hasher.side) for content in contents])
            blocks = np.split(queries, range(100, len(queries), 100))
            codes, quantized = hasher.encode_with_features(blocks, size=100)
            hits = collection.nearest(codes, 500)
            begun = time.perf_counter()
            for number in range(TIMED):
                collection.reranked_by_features(quantized[number : number + 1], hits[number : number + 1])
            milliseconds = 1000 * (time.perf_counter() - begun) / TIMED
            ranked = collection.reranked_by_features(quantized, hits)
            cosine = np.argsort(-exact_features(hasher, queries) @ features.T, axis=1, kind="stable")
            # As the search orders them: those of one distance by features, too.
            plain = [sorted(some, key=lambda hit: hit.distance) for some in ranked]
            orders = [[[hit.number for hit in some] for some in each] for each in (plain, ranked)] + [cosine.tolist()]
            shares = [
                f"{100 * np.mean([number in order[:k] for number, order in enumerate(each)]):.1f}"
                for each in orders
                for k in (1, 10)
            ]
            rows.append([name, *shares, f"{milliseconds:.1f}"])
            print(" | ".join(rows[-1]), flush=True)
    finally:
        shutil.rmtree(place)
    ways = [f"{way} @{k}" for way in ("by distance", "re-ranked", "cosine") for k in (1, 10)]
    measuring.print_table(["change", *ways, "ms to rank"], rows)
    print(f"bytes a photo: {codes.shape[1]} of its code, {quantized.shape[1]} of its features")


def exact_features(hasher: cib.Hasher, squares: np.ndarray) -> np.ndarray:
    """Returns the backbone's features in floating point, scaled to length 1."""
    blocks = [squares[start : start + 100] for start in range(0, len(squares), 100)]
    rows = [np.asarray(plain_features(hasher.encoder, hasher.params, hasher.frozen, block)) for block in blocks]
    features = np.concatenate(rows)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def measure_false(folder: pathlib.Path, encoder: pathlib.Path) -> None:
    """Prints, for each kind of different pictures, the groups among them, and how many are found again."""
    rows = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as place:
            alone, *_ = groups(f"{place}/index of originals", kind, encoder)
            pictures = sorted(kind.iterdir())
            for number, path in enumerate(pictures):
                image = PIL.Image.open(path)
                flat = PIL.Image.new("RGB", image.size, "white" if "white" not in kind.name else "gray")
                flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
                flat.save(f"{place}/{number:05}.png")
                pathlib.Path(place, f"{number:05}_jpeg.jpg").write_bytes(jpeg(flat))
                pathlib.Path(place, f"{number:05}_half.jpg").write_bytes(jpeg(resize(0.5)(flat), 85))
            found, *_ = groups(f"{place}/index", place, encoder)
        owners = [{path[:5] for path in group} for group in found]
        whole = sum(len(set(group)) == 3 and len(owner) == 1 for group, owner in zip(found, owners, strict=True))
        false = sum(len(owner) - 1 for owner in owners)
        rows.append([kind.name, str(len(pictures)), str(len(alone)), str(whole), str(false)])
        print(" | ".join(rows[-1]), flush=True)
    measuring.print_table(["kind", "pictures", "groups among them", "found with both copies", "false joins"], rows)


def main() -> None:
    """Reads the flags and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder of photos")
    parser.add_argument("--photos", type=int, default=1000, help="number of photos")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, default=list(CHANGES), help="rows of the table")
    parser.add_argument("--encoder", type=pathlib.Path, help="folder of a saved Hasher")
    parser.add_argument("--false", type=pathlib.Path, help="folder of pictures that are all different")
    parser.add_argument("--search", action="store_true", help="measure the search for the original instead")
    parser.add_argument("--seconds", type=int, default=0, help="measure the time for so many photos instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of photos")
    flags = parser.parse_args()
    photos = draw(flags.folder, flags.photos, flags.seed)
    with tempfile.TemporaryDirectory() as place:
        encoder = flags.encoder
        if encoder is None:
            for number, path in enumerate(photos):
                shutil.copy(path, f"{place}/{number:05}.jpg")
            cib.index_photos(f"{place}/index", place, console=QUIET)
            encoder = pathlib.Path(place, "encoder")
            cib.Collection.open(f"{place}/index").hasher.save(encoder)
        if flags.seconds:
            measure_seconds(flags.seconds, flags.folder, encoder)
        elif flags.search:
            measure_search(flags.changes, photos, encoder)
        elif flags.changes:
            measure_changes(flags.changes, photos, encoder, place)
        if flags.false:
            measure_false(flags.false, encoder)


if __name__ == "__main__":
    main()
