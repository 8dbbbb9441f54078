"""Items that users share: texts, tensors and image files, their order, fingerprints and damage."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toys import COUNT, toy

from backbones.images import as_images
from users.base import Examples
from users.items import ImageFiles, TensorItems, TextItems


def test_texts_are_taken_in_the_order_asked_and_kept_shortest_first():
    items = TextItems(("three words here", "one", "two words", "", "uno"))
    assert len(items) == 5
    assert items.take([2, 0, 2]) == ["two words", "three words here", "two words"]
    assert items.order() == [3, 1, 4, 2, 0]


def test_tensors_are_taken_in_the_order_asked_and_stay_bytes():
    values = torch.arange(12, dtype=torch.uint8).view(4, 1, 3)
    items = TensorItems(values)
    assert items.order() == [0, 1, 2, 3]
    for positions in ([3, 0, 3], torch.tensor([3, 0, 3])):
        taken = items.take(positions)
        assert taken.dtype == torch.uint8
        assert torch.equal(taken, values[[3, 0, 3]])


def test_fingerprints_of_texts_know_content_order_and_borders():
    texts = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "C"), ("ab", "c", ""), ("abc",)]
    assert len({TextItems(each).fingerprint() for each in texts}) == len(texts)
    assert TextItems(("ab", "c")).fingerprint() == TextItems(("ab", "c")).fingerprint()


def test_fingerprints_of_tensors_know_values_shape_and_type():
    values = torch.zeros(2, 6, dtype=torch.uint8)
    other = values.clone()
    other[1, 5] = 1
    kinds = [values, other, values.view(2, 2, 3), values.bool()]
    assert len({TensorItems(each).fingerprint() for each in kinds}) == len(kinds)
    assert TensorItems(values.clone()).fingerprint() == TensorItems(values).fingerprint()


@pytest.fixture
def pictures(tmp_path):
    paths = tuple(tmp_path / f"{name}.png" for name in "abc")
    for number, path in enumerate(paths):
        Image.new("L", (4 + number, 3), 50 * number).save(path)
    return ImageFiles(paths)


def test_image_files_are_opened_when_they_are_taken(pictures):
    taken = pictures.take([2, 0])
    assert [image.size for image in taken] == [(6, 3), (4, 3)]
    assert [image.getpixel((0, 0)) for image in taken] == [100, 0]
    assert (len(pictures), pictures.order()) == (3, [0, 1, 2])


def test_fingerprints_of_image_files_know_order_and_every_change_of_content(pictures):
    first = pictures.fingerprint()
    assert ImageFiles(pictures.paths).fingerprint() == first
    assert ImageFiles(pictures.paths[::-1]).fingerprint() != first
    before = pictures.paths[1].stat()
    Image.new("L", (40, 30), 7).save(pictures.paths[1])
    os.utime(pictures.paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pictures.fingerprint() != first


def test_fingerprints_of_image_files_stay_when_their_folder_moves(tmp_path):
    home = tmp_path / "first"
    home.mkdir()
    Image.new("L", (4, 3)).save(home / "1.png")
    first = ImageFiles((home / "1.png",)).fingerprint()
    moved = home.rename(tmp_path / "second")
    assert ImageFiles((moved / "1.png",)).fingerprint() == first
    assert ImageFiles(()).fingerprint() == ImageFiles(()).fingerprint() != first


def test_an_image_that_claims_to_be_huge_is_named_as_well(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(ValueError, match=rf"{re.escape(str(pictures.paths[1]))} cannot be read .*decompression bomb"):
        pictures.take([1])


@pytest.mark.parametrize("damage", ["text", "truncated", "missing"])
def test_an_image_that_cannot_be_read_is_named_with_a_cure(pictures, damage):
    path = pictures.paths[1]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:50])
    pictures.take([0, 2])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read .*mend the file or take its row out"):
        pictures.take([0, 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_sixteen_bits_look_as_those_of_eight_do(tmp_path, channels):
    shades = np.arange(0, 256, 17, dtype=np.uint16).reshape(4, 4)
    Image.fromarray((shades * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(shades.astype(np.uint8)).save(tmp_path / "usual.png")
    pictures = ImageFiles((tmp_path / "deep.png", tmp_path / "usual.png")).take([0, 1])
    assert pictures[0].mode.startswith("I")
    for size in ((4, 4), (6, 8)):
        deep, usual = as_images(pictures, channels, size)
        assert deep.shape == (channels, *size)
        torch.testing.assert_close(deep, usual, atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        (torch.zeros(2, 4, 8, 8), r"1 or 3, H, W\].*not \[2, 4, 8, 8\] of torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8 or float in 0..1, not .* of torch.int64"),
    ],
)
def test_tensors_of_other_channels_or_numbers_are_refused(images, wanted):
    with pytest.raises(ValueError, match=wanted):
        as_images(images, 3, (8, 8))


@pytest.mark.parametrize(("mode", "kind"), [("F", np.float32), ("I", np.int32)])
def test_images_whose_white_is_unknown_are_named_with_a_cure(tmp_path, mode, kind):
    Image.fromarray(np.full((4, 4), 0.5 if mode == "F" else 70_000, dtype=kind)).save(tmp_path / "vague.tiff")
    with pytest.raises(ValueError, match=rf"vague\.tiff holds numbers of 32 bits .*mode {mode}.*8 or 16 bits per channel"):
        as_images(ImageFiles((tmp_path / "vague.tiff",)).take([0]), 3, (4, 4))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ([0, 3], [0, 10], r"population 'toy' has fitting labels outside 0\.\.9; map labels"),
        ([0, 3], [-1, 0], r"population 'toy' has fitting labels outside 0\.\.9; map labels"),
        ([0, COUNT], [0, 1], r"population 'toy' has fitting inputs outside 0\.\.39, the items"),
        ([-1, 3], [0, 1], r"population 'toy' has fitting inputs outside 0\.\.39, the items"),
    ],
)
def test_fitting_examples_outside_classes_or_items_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        replace(toy(), fitting=Examples(torch.tensor(inputs), torch.tensor(labels)))


def test_fitting_examples_within_classes_and_items_or_none_are_fine():
    for inputs, labels in (([0, COUNT - 1], [0, 9]), ([], [])):
        replace(toy(), fitting=Examples(torch.tensor(inputs, dtype=torch.long), torch.tensor(labels, dtype=torch.long)))
