"""Messages of libtiff: in the reason of the file that they are about, or printed with its name."""

import concurrent.futures
import io
import sys

import PIL.Image
import pytest

from cib_jax.data.photos import BadPhotoError, decode
from tests.data import pictures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libtiff is found on Linux only")


def damaged(compression):
    image = pictures.smooth(60, 40)
    image = image.convert("1") if compression == "group4" else image
    content = bytearray(pictures.content(image, "TIFF", compression=compression))
    with PIL.Image.open(io.BytesIO(content)) as opened:
        start, size = opened.tag_v2[273][0], opened.tag_v2[279][0]
    middle = start + size // 2
    content[middle : middle + 4] = b"\xff" * 4
    return bytes(content)


def test_the_reason_of_a_damaged_tiff_is_what_libtiff_says(capfd):
    contents = [damaged("tiff_deflate"), damaged("tiff_lzw")] * 8

    def reason(content):
        with pytest.raises(BadPhotoError) as error:
            decode(content, 8)
        return str(error.value)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(reason, contents))
    assert all("ZIPDecode" in found for found in reasons[::2])
    assert all("LZW" in found or "code" in found for found in reasons[1::2])
    assert not any("ZIPDecode" in found for found in reasons[1::2])
    assert capfd.readouterr().err == ""


def test_a_message_about_a_tiff_that_is_decoded_has_its_name(tmp_path, capfd):
    path = tmp_path / "fax.tif"
    path.write_bytes(damaged("group4"))
    assert decode(path, 8).shape == (8, 8, 3)
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 1 and printed[0].startswith(f"{path}: ")


def test_files_of_others_keep_the_default(capfd):
    with pytest.raises(OSError, match="decoder"):
        PIL.Image.open(io.BytesIO(damaged("tiff_deflate"))).load()
    assert "ZIPDecode" in capfd.readouterr().err
