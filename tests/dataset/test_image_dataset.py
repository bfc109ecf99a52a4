"""The dataset of pairs: what it returns, how it calls its loader, and what it refuses."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcs_dataset import ImageDataset, pil_loader, to_tensors
from gcs_prefetchd.shared.errors import InvalidNameError, ItemError, SettingsError
from support.datasets import number_of, write_local


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_local(tmp_path, 5)
    return tmp_path


def test_a_sample_is_the_image_and_its_label(folder: Path) -> None:
    dataset = ImageDataset(str(folder), ["0000", "0003"])
    image, label = dataset[1]
    assert (len(dataset), image.mode, label.mode, number_of(image)) == (2, "RGB", "RGB", 3)
    assert label.getpixel((0, 0)) == (3, 6, 252)


def test_index_labels_keep_their_class_indices_and_images_their_colours(folder: Path) -> None:
    image, label = ImageDataset(folder, ["0003"], label_mode="index")[0]
    assert (image.mode, label.mode, label.getpixel((0, 0))) == ("RGB", "P", 3)


def test_a_transform_gets_the_pair_as_one_argument_and_returns_the_sample(folder: Path) -> None:
    dataset = ImageDataset(folder, ["0003"], transform=lambda pair: [len(pair), number_of(pair[0])])
    assert dataset[0] == [2, 3]


def test_a_custom_loader_needs_only_one_argument(folder: Path) -> None:
    paths: list[str] = []

    def loader(path: str) -> Image.Image:
        paths.append(path)
        return pil_loader(path)

    image, _ = ImageDataset(folder, ["0002"], loader)[0]
    assert number_of(image) == 2
    assert paths == [f"{folder}/images/0002.jpg", f"{folder}/labels/0002.png"]


def test_a_loader_with_load_many_gets_both_parts_at_once() -> None:
    class Loader:
        def __call__(self, uri: str) -> Image.Image:
            raise AssertionError("called for one path")

        def load_many(self, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
            self.paths = list(zip(uris, modes, strict=True))
            return [Image.new("L", (1, 1)), Image.new("L", (1, 1))]

    loader = Loader()
    _ = ImageDataset("gs://bucket/set/", ["a/7"], loader, label_mode="index")[0]
    assert loader.paths == [("gs://bucket/set/images/a/7.jpg", "RGB"), ("gs://bucket/set/labels/a/7.png", None)]


def test_patterns_define_the_names_of_the_parts(folder: Path) -> None:
    (folder / "images/0001.jpg").rename(folder / "photo-0001.jpeg")
    (folder / "labels/0001.png").rename(folder / "mask-0001.png")
    dataset = ImageDataset(folder, ["0001"], image_pattern="photo-{id}.jpeg", label_pattern="mask-{id}.png")
    assert number_of(dataset[0][0]) == 1


@pytest.mark.parametrize("index", [-1, 4, np.int64(4), torch.tensor(4)], ids=["negative", "int", "numpy", "torch"])
def test_every_kind_of_index_is_accepted(folder: Path, index: int) -> None:
    image, _ = ImageDataset(folder, [f"{number:04d}" for number in range(5)])[index]
    assert number_of(image) == 4


def test_slices_and_what_is_out_of_range_are_refused(folder: Path) -> None:
    dataset = ImageDataset(folder, ["0000"])
    with pytest.raises(TypeError, match="accepts one index"):
        dataset[0:1]  # type: ignore[index]
    for index in [1, -2]:
        with pytest.raises(IndexError):
            dataset[index]


def test_a_dataset_can_be_iterated_over(folder: Path) -> None:
    dataset = ImageDataset(folder, ["0000", "0003"])
    assert [number_of(image) for image, _ in (dataset[i] for i in range(len(dataset)))] == [0, 3]


def test_invalid_settings_are_named(folder: Path) -> None:
    with pytest.raises(SettingsError, match="label_mode must be 'RGB' or 'index', not 'rgb'"):
        ImageDataset(folder, [], label_mode="rgb")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="pattern 'images'"):
        ImageDataset(folder, [], image_pattern="images")
    with pytest.raises(InvalidNameError, match="http"):
        ImageDataset("http://b/set", [])


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "labels/0001.png").unlink()
    with pytest.raises(ItemError, match=r"labels/0001\.png: No such file"):
        ImageDataset(folder, ["0001"])[0]


def test_a_dataset_can_be_pickled(folder: Path) -> None:
    dataset = pickle.loads(pickle.dumps(ImageDataset(folder, ["0003"], transform=to_tensors, label_mode="index")))
    image, label = dataset[0]
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((3, 16, 16), torch.uint8, (16, 16), torch.int64)
    assert set(label.flatten().tolist()) == {3}
