"""The frozen listing of a data root."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.shared.errors import ManifestError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion

ROOT = DataRoot.parse("gs://pictures/train")

ids_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def version(name: str, generation: int = 1, size: int = 10, crc32c: int | None = 7) -> ObjectVersion:
    return ObjectVersion(ObjectName(ROOT.bucket, ROOT.folder + name), generation, size, crc32c)


def items(*ids: str) -> list[ObjectVersion]:
    """Image and label of each id, each with its own generation, size and crc32c."""
    return [
        version(ItemPatterns().part_name(one, part), 1000 + 10 * i + part, 20 + i + part, (i << 20) + part)
        for i, one in enumerate(sorted(ids))
        for part in (0, 1)
    ]


def build(*objects: ObjectVersion) -> Manifest:
    return build_manifest(ROOT, ItemPatterns(), objects)


def test_the_order_of_the_listing_makes_no_difference() -> None:
    objects = items("b", "a", "ü/ß", "c/1")
    reference = build(*objects)
    for seed in range(20):
        random.Random(seed).shuffle(objects)
        shuffled = build(*objects)
        assert shuffled.digest == reference.digest
        assert list(shuffled.ids) == list(reference.ids) == ["a", "b", "c/1", "ü/ß"]
        assert [shuffled.versions(i) for i in range(4)] == [reference.versions(i) for i in range(4)]


def test_an_items_versions_are_the_listed_ones() -> None:
    objects = items("x", "y")
    manifest = build(*objects)
    assert [v for item in range(len(manifest)) for v in manifest.versions(item)] == objects


def test_a_part_without_a_crc32c_has_none() -> None:
    manifest = build(version("images/a.jpg", crc32c=None), version("labels/a.png", crc32c=0))
    assert [part.crc32c for part in manifest.versions(0)] == [None, 0]


def test_items_without_all_parts_are_named_and_left_out() -> None:
    objects = [*items("complete"), version("images/no-label.jpg"), version("labels/no-image.png")]
    manifest = build(*objects)
    assert list(manifest.ids) == ["complete"]
    assert manifest.incomplete == (
        "gs://pictures/train/images/no-image.jpg",
        "gs://pictures/train/labels/no-label.png",
    )


@pytest.mark.parametrize(
    "name", ["images/", "images/.jpg", "images/a.png", "labels/a.jpg", "README.md", "image/a.jpg", "labels"]
)
def test_objects_that_are_not_part_of_an_item_are_ignored(name: str) -> None:
    manifest = build(*items("a"), version(name))
    assert list(manifest.ids) == ["a"]
    assert manifest.incomplete == ()
    assert manifest.digest == build(*items("a")).digest


def test_the_digest_changes_with_every_difference() -> None:
    objects = items("a", "b")
    image = objects[0]
    others = [
        build(*objects[:2]),
        build(ObjectVersion(image.name, image.generation + 1, image.size, image.crc32c), *objects[1:]),
        build(ObjectVersion(image.name, image.generation, image.size + 1, image.crc32c), *objects[1:]),
        build(ObjectVersion(image.name, image.generation, image.size, None), *objects[1:]),
        build(*items("a", "c")),
        build(*items("ab", "b")),
    ]
    digests = {manifest.digest for manifest in [build(*objects), *others]}
    assert len(digests) == len(others) + 1


def test_a_data_root_without_prefix_has_a_manifest_too() -> None:
    root = DataRoot.parse("gs://pictures")
    name = ObjectName("pictures", "images/a.jpg")
    objects = [ObjectVersion(name, 1, 2, 3), ObjectVersion(ObjectName("pictures", "labels/a.png"), 1, 2, 3)]
    manifest = build_manifest(root, ItemPatterns(), objects)
    assert manifest.find(name) == (0, 0)
    assert manifest.part_name(0, 1).uri == "gs://pictures/labels/a.png"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.sets(ids_text, max_size=12))
@example(set())
@example({"é", "e\u0301", "日本/1", "a/b/c", "\n", "..", "z" * 500})
def test_a_saved_manifest_is_loaded_unchanged(tmp_path: Path, ids: set[str]) -> None:
    built = build(*items(*ids), version("images/lonely-object-without-label.jpg"))
    loaded = load_manifest(built.save(tmp_path))
    assert_equal(loaded, built)
    assert loaded.incomplete == built.incomplete
    assert loaded.digest == built.digest
    assert (loaded.data_root, loaded.item_patterns) == (built.data_root, built.item_patterns)


def test_a_loaded_manifest_is_mapped_and_not_read(tmp_path: Path) -> None:
    """A million items take no private memory of a worker."""
    loaded = load_manifest(build(*items("a", "b")).save(tmp_path))
    assert all(isinstance(array, np.memmap) for array in (loaded.generation, loaded.size, loaded.crc32c))
    assert all(isinstance(array, np.memmap) for array in (loaded.ids.text, loaded.ids.ends))
    assert not loaded.generation.flags.writeable


def test_saving_twice_writes_once(tmp_path: Path) -> None:
    manifest = build(*items("a"))
    folder = manifest.save(tmp_path)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert manifest.save(tmp_path) == folder
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_saving_again_makes_it_the_newest(tmp_path: Path) -> None:
    manifest = build(*items("a"))
    folder = manifest.save(tmp_path)
    os.utime(folder, (1, 1))
    manifest.save(tmp_path)
    assert folder.stat().st_mtime > 1


def test_of_an_object_listed_twice_the_last_counts() -> None:
    objects = items("a")
    assert build(version("images/a.jpg", generation=1), *objects).versions(0) == objects


@pytest.mark.parametrize("file", ["ids.npy", "ends.npy", "generation.npy"])
@pytest.mark.parametrize("damage", ["emptied", "zeroed", "truncated", "removed"])
def test_a_manifest_loaded_without_verification_must_still_have_its_form(tmp_path: Path, file: str, damage: str) -> None:
    folder = build(*items("a", "b")).save(tmp_path)
    DAMAGES[damage](folder / file)
    with pytest.raises(ManifestError, match=str(folder)):
        load_manifest(folder, verify=False)


@pytest.mark.parametrize("form", ["id_", "{:07}", "{:x}-and-a-tail-that-is-the-same"])
def test_thousands_of_items_are_built_whatever_the_order_of_the_listing(form: str) -> None:
    names = [form.format(i) if "{" in form else f"{form}{i}" for i in range(3000)]
    objects = items(*names)
    random.Random(1).shuffle(objects)
    manifest = build(*objects, *(version(f"images/x{i}.jpg") for i in range(500)))
    assert list(manifest.ids) == sorted(names)
    assert [v for i in range(3000) for v in manifest.versions(i)] == items(*names)
    assert len(manifest.incomplete) == 500


def test_a_temporary_folder_left_by_a_crash_is_not_a_manifest(tmp_path: Path) -> None:
    manifest = build(*items("a"))
    folder = manifest.save(tmp_path)
    leftover = tmp_path / f"{manifest.digest}.1.tmp"
    folder.rename(leftover)
    with pytest.raises(ManifestError):
        load_manifest(leftover)
    assert_equal(load_manifest(manifest.save(tmp_path)), manifest)


FILES = ["manifest.json", "ids.npy", "ends.npy", "generation.npy", "size.npy", "crc32c.npy"]


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "removed": lambda file: file.unlink(),
    "a directory": replace_by_directory,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named_and_never_used(tmp_path: Path, file: str, damage: str) -> None:
    folder = build(*items("a", "b")).save(tmp_path)
    DAMAGES[damage](folder / file)
    with pytest.raises(ManifestError, match=str(folder)):
        load_manifest(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_manifest_that_a_power_cut_damaged_is_written_again(tmp_path: Path, file: str) -> None:
    """Its name is its digest, so a later listing of the same objects would not replace it."""
    manifest = build(*items("a", "b"))
    (manifest.save(tmp_path) / file).write_bytes(b"")
    assert_equal(load_manifest(manifest.save(tmp_path)), manifest)
    assert len(list(tmp_path.iterdir())) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_one_flipped_byte_never_changes_an_item(tmp_path: Path, file: str, where: float, flip: int) -> None:
    built = build(*items("a", "b", "c"))
    folder = built.save(tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[int(where * len(content))] ^= flip
    (folder / file).write_bytes(content)
    try:
        loaded = load_manifest(folder)
    except ManifestError:
        pass
    else:
        assert_equal(loaded, built)
        assert (loaded.data_root, loaded.item_patterns) == (built.data_root, built.item_patterns)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["ends.npy", "generation.npy", "size.npy", "crc32c.npy"])
@pytest.mark.parametrize("kind", ["<u8", "<f8", ">i8", "<m8"])
def test_the_same_bytes_with_another_number_type_are_refused(tmp_path: Path, file: str, kind: str) -> None:
    folder = build(*items("a")).save(tmp_path)
    content = (folder / file).read_bytes()
    assert b"<i8" in content
    (folder / file).write_bytes(content.replace(b"<i8", kind.encode()))
    with pytest.raises(ManifestError, match="its content does not match its name"):
        load_manifest(folder)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    folder = build(*items("a")).save(tmp_path)
    (folder / "ids.npy").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    with pytest.raises(ManifestError):
        load_manifest(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("about", ["[]", "{}", '{"data_root": 1}', "null", "[" * 100_000])
def test_a_manifest_with_an_invalid_description_is_refused(tmp_path: Path, about: str) -> None:
    folder = build(*items("a")).save(tmp_path)
    (folder / "manifest.json").write_text(about)
    with pytest.raises(ManifestError, match=r"manifest .*: "):
        load_manifest(folder)


@pytest.mark.parametrize(("field", "value"), [("data_root", "gs://X"), ("patterns", ["a", "b"]), ("data_root", "gs://other/x")])
def test_a_manifest_of_another_data_root_or_other_patterns_is_refused(tmp_path: Path, field: str, value: object) -> None:
    folder = build(*items("a")).save(tmp_path)
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | {field: value}))
    with pytest.raises(ManifestError, match=str(folder)):
        load_manifest(folder)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nowhere"):
        load_manifest(tmp_path / "nowhere")


def test_find_returns_every_part_and_nothing_else() -> None:
    manifest = build(*items("a", "b/c", "d"))
    for item in range(len(manifest)):
        for part in (0, 1):
            assert manifest.find(manifest.part_name(item, part)) == (item, part)
    for name in ("train/images/x.jpg", "train/images/a.png", "images/a.jpg", "train/images/aa.jpg", "train/"):
        assert manifest.find(ObjectName("pictures", name)) is None
    assert manifest.find(ObjectName("drawings", "train/images/a.jpg")) is None


def test_mapped_ids_are_pickled_by_name_and_others_by_value(tmp_path: Path) -> None:
    built = build(*items(*(f"{i:06}" for i in range(2000))))
    mapped = load_manifest(built.save(tmp_path)).ids
    by_name, by_value = pickle.dumps(mapped), pickle.dumps(built.ids)
    assert len(by_name) < 1000 < len(by_value)
    assert pickle.loads(by_name) == pickle.loads(by_value) == built.ids
    shutil.rmtree(tmp_path)
    assert pickle.loads(pickle.dumps(mapped)) == built.ids


def test_labels_may_be_beside_their_images_under_a_longer_name() -> None:
    """`7_mask.png` matches `{id}.png` too."""
    objects = [version(name) for name in ("7.png", "7_mask.png", "8.png", "8_mask.png")]
    for patterns in (("{id}.png", "{id}_mask.png"), ("{id}_mask.png", "{id}.png")):
        manifest = build_manifest(ROOT, ItemPatterns(patterns), objects)
        assert list(manifest.ids) == ["7", "8"]
        assert manifest.incomplete == ()


def assert_equal(one: Manifest, other: Manifest) -> None:
    assert list(one.ids) == list(other.ids)
    assert [one.versions(i) for i in range(len(one))] == [other.versions(i) for i in range(len(other))]
