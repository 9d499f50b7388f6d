"""Photographs of any depth, and what Windows, telephones and labelme write beside pictures."""

from __future__ import annotations

import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from ovam_core.data.annotated import _inside
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.data.voc_folder import read_voc
from ovam_core.errors import InputError
from ovam_core.io.files import find_file
from ovam_core.io.pictures import read_photo
from ovam_core.plot import label_image

RAMP = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
SHOWN = np.rint(RAMP * 255)


def photo(values: np.ndarray) -> np.ndarray:
    return np.asarray(read_photo(Image.fromarray(values))).astype(int)


# ------------------------------------------------------------------------------------------------ photographs


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_whole_numbers_are_scaled_by_the_bits_that_hold_them(bits, dtype):
    seen = photo(np.rint(RAMP * (2**bits - 1)).astype(dtype))
    assert np.abs(seen - SHOWN[..., None]).max() <= 1
    assert seen[-1, -1].tolist() == [255] * 3


def test_floats_from_0_to_1():
    for values in (RAMP, RAMP * 0.5, RAMP + 0.001):
        assert np.abs(photo(values) - np.rint(values.clip(0, 1) * 255)[..., None]).max() <= 1


@pytest.mark.parametrize(
    "values",
    [RAMP * 40, RAMP * 3 - 1, (RAMP * 70000).astype(np.int32), (RAMP * 9 - 5).astype(np.int32), RAMP * np.nan],
)
def test_values_of_no_known_range_are_refused(values):
    with pytest.raises(InputError, match="values") as caught:
        photo(values)
    assert "\n" not in str(caught.value)
    assert "PNG" in str(caught.value)


def test_colours_of_other_spaces():
    rgb = Image.fromarray(np.dstack([SHOWN, SHOWN[::-1], np.full_like(SHOWN, 90)]).astype(np.uint8))
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for other, near in ((lab, 3), (rgb.convert("CMYK"), 0), (rgb.convert("YCbCr"), 2), (rgb.convert("HSV"), 2)):
        assert np.abs(np.asarray(read_photo(other)).astype(int) - np.asarray(rgb)).mean() <= near


def test_small_and_moving_pictures(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_photo(tmp_path / name).getpixel((3, 3)) == (255, 0, 0)
    for mode in ("1", "L", "I;16", "F", "RGBA", "P"):
        assert read_photo(Image.new(mode, (1, 1))).size == (1, 1)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def test_heic_without_its_reader_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.jpg").write_bytes(HEIC)  # by its content, not by its name
    with pytest.raises(InputError, match=r"HEIC picture; .*JPEG.*pip install pillow-heif"):
        read_photo(tmp_path / "x.jpg")


def test_heic_with_its_reader(tmp_path, monkeypatch):
    def register_heif_opener():
        monkeypatch.setattr(Image, "open", lambda _: Image.new("RGB", (4, 3), "blue"))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    (tmp_path / "x.heic").write_bytes(HEIC)
    assert read_photo(tmp_path / "x.heic").getpixel((0, 0)) == (0, 0, 255)


# ------------------------------------------------------------------------------------------------ lists and names


def voc(root, photos, truths, listed: bytes):
    for folder, names in (("JPEGImages", photos), ("SegmentationClass", truths)):
        (root / folder).mkdir(parents=True)
        for name in names:
            picture = Image.new("RGB", (8, 6)) if folder == "JPEGImages" else label_image(np.full((6, 8), 8, np.uint8))
            picture.save(root / folder / name, format="PNG")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_bytes(listed)
    return read_voc(root)


LISTS = {
    "a byte order mark": "\ufeffIMG 1\nIMG_2\n".encode(),
    "UTF-16": "\ufeffIMG 1\nIMG_2\n".encode("utf-16-le"),
    "lines of Windows": b"IMG 1\r\nIMG_2\r\n",
    "blanks": b"  IMG 1 \t\n\n IMG_2\t \n\n",
    "suffixes": b"IMG 1.JPG\nIMG_2.jpg\n",
    "VOC's flags": b"IMG 1  1\nIMG_2 -1\n",
    "another case": b"img 1\nimg_2\n",
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_as_they_are_written(case, tmp_path):
    data = voc(tmp_path, ["IMG 1.JPG", "IMG_2.jpeg"], ["IMG 1.png", "IMG_2.PNG"], LISTS[case])
    assert [data.photo(item).name for item in data.work.items] == ["IMG 1.JPG", "IMG_2.jpeg"]
    assert all((data.truth(item) == 8).all() for item in data.work.items)
    assert [item.classes for item in data.work.items] == [("cat",)] * 2
    assert data.work.classes == VOC_CLASSES


def test_marks_put_together_otherwise(tmp_path):
    apart, together = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    data = voc(tmp_path, [f"{apart}.jpg"], [f"{apart}.png"], together.encode())
    assert data.photo(data.work.items[0]).is_file()


def test_the_folder_of_older_labelme(tmp_path):
    voc(tmp_path, ["a.jpg"], ["a.png"], b"a")
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassPNG")
    (tmp_path / "class_names.txt").write_text("_background_\ncat\n" + "".join(f"c{n}\n" for n in range(7)))
    data = read_voc(tmp_path)
    assert (data.truth(data.work.items[0]) == 8).all()


def test_a_file_by_a_name_that_is_nearly_its_own(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/Cat.PNG").write_bytes(b"x")
    assert find_file(tmp_path / "masks", ["cat.png"]) == tmp_path / "masks/Cat.PNG"
    assert find_file(tmp_path / "masks", ["dog.png", "Cat.PNG"]) == tmp_path / "masks/Cat.PNG"
    assert find_file(tmp_path / "masks", ["dog.png"]) is None
    assert find_file(tmp_path / "none", ["cat.png"]) is None
    assert _inside(tmp_path, "masks\\cat.png") == tmp_path / "masks/Cat.PNG"
    assert _inside(tmp_path, "masks/dog.png") == tmp_path / "masks/dog.png"
    (tmp_path / "masks/dog.PNG").write_bytes(b"x")  # a list of names does not outlive a change
    assert find_file(tmp_path / "masks", ["dog.png"]) == tmp_path / "masks/dog.PNG"
