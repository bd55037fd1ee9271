"""Resized pictures on disk: the same bits as without, mended when damaged, bounded, whole under several writers."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirage.data import tile_cache
from mirage.data.pictures import PictureLoader
from mirage.data.tensor_store import TensorStore, content_key
from mirage.data.tile_cache import TileCache, open_tile_cache, pixels_key
from mirage.errors import UserError
from mirage.models import ModelAdapter
from mirage.models.registry import load_adapter

FAMILIES = ("internvl", "qwen2_vl")


def picture(folder: Path, *, seed: int = 0, size: tuple[int, int] = (150, 90), ending: str = "png") -> Path:
    path = folder / f"{seed}.{ending}"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(params=FAMILIES)
def adapter(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> ModelAdapter:
    return load_adapter(tiny_folders[request.param])


def loader(adapter: ModelAdapter, cache: TileCache | None) -> PictureLoader:
    return PictureLoader(adapter, cache_bytes=0, tiles=cache)


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("num_images", [1, 2])
def test_cached_pictures_have_the_same_bits(
    adapter: ModelAdapter, tmp_path: Path, ending: str, num_images: int
) -> None:
    path = picture(tmp_path, ending=ending)
    plain = loader(adapter, None).load(path, key="", num_images=num_images)
    for hits in (0, 1):
        cache = TileCache(tmp_path / "tiles", limit_bytes=10**9)
        found = loader(adapter, cache).load(path, key="", num_images=num_images)
        assert (cache.store.num_hits, cache.store.num_misses) == (hits, 1 - hits)
        assert found.num_tokens == plain.num_tokens
        for name, tensor in plain.tensors.items():
            assert tensor.dtype == found.tensors[name].dtype and torch.equal(tensor, found.tensors[name])


def test_normalising_is_upstreams_arithmetic_to_the_bit(adapter: ModelAdapter) -> None:
    from mirage.models import internvl, qwen2_vl

    module = internvl if adapter.family == "internvl" else qwen2_vl
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    wanted = (values - np.array(module.IMAGE_MEAN, np.float32)) / np.array(module.IMAGE_STD, np.float32)
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 3)
    found = internvl.normalized(pixels, mean=module.IMAGE_MEAN, std=module.IMAGE_STD, axis=1)
    assert np.array_equal(found.numpy(), wanted)


def test_key_follows_content_settings_and_code(
    adapter: ModelAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = picture(tmp_path).read_bytes()
    key = pixels_key(content, adapter, num_images=1)
    assert pixels_key(content, adapter, num_images=1) == key
    assert pixels_key(content + b"x", adapter, num_images=1) != key
    adapter.spec = adapter.spec.model_copy(update={"max_tiles": 3, "max_pixels": 56 * 56})
    assert pixels_key(content, adapter, num_images=1) != key
    changed = pixels_key(content, adapter, num_images=1)
    monkeypatch.setattr(tile_cache, "code_version", lambda _class: "another")
    assert pixels_key(content, adapter, num_images=1) != changed


def test_changed_picture_under_the_same_name_is_seen(adapter: ModelAdapter, tmp_path: Path) -> None:
    cache = TileCache(tmp_path / "tiles", limit_bytes=10**9)
    path = picture(tmp_path)
    before = cache.pixels(path, adapter, num_images=1)
    picture(tmp_path, seed=1).replace(path)
    after = cache.pixels(path, adapter, num_images=1)
    assert not torch.equal(before, after)


def damage_tail(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_shape(path: Path) -> None:
    content = path.read_bytes()
    start = content.index(b'"shape":[') + len(b'"shape":[')
    digits = content[start : content.index(b"]", start)]
    swapped = b",".join(reversed(digits.split(b",")))
    path.write_bytes(content.replace(digits, swapped, 1))


@pytest.mark.parametrize(
    "damage",
    [
        damage_tail,
        damage_shape,
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
    ],
)
def test_damaged_entry_is_made_again(tiny_folders: dict[str, Path], tmp_path: Path, damage) -> None:
    adapter = load_adapter(tiny_folders["internvl"])
    cache = TileCache(tmp_path / "tiles", limit_bytes=10**9)
    path = picture(tmp_path, size=(200, 60))
    good = cache.pixels(path, adapter, num_images=1)
    entry = cache.store.path(pixels_key(path.read_bytes(), adapter, num_images=1))
    whole = entry.read_bytes()
    damage(entry)
    assert entry.read_bytes() != whole
    assert torch.equal(cache.pixels(path, adapter, num_images=1), good)
    assert entry.read_bytes() == whole


def test_entry_under_another_key_is_not_taken(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, setting="test")
    one, two = content_key(1), content_key(2)
    store.put(one, {"pixels": torch.zeros(3)})
    store.path(two).parent.mkdir(exist_ok=True)
    store.path(one).rename(store.path(two))
    assert store.get(two) is None


def filled(folder: Path, *, limit_bytes: int, numbers: range) -> TensorStore:
    store = TensorStore(folder, limit_bytes=limit_bytes, setting="test")
    for number in numbers:
        store.put(content_key(number), {"pixels": torch.full((1000,), number, dtype=torch.uint8)})
    return store


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_limit_holds_and_a_runs_own_entries_stay(tmp_path: Path) -> None:
    store = filled(tmp_path, limit_bytes=5000, numbers=range(10))
    kept = [number for number in range(10) if store.get(content_key(number)) is not None]
    # A pass over more than fits must not push out what its next pass begins with.
    assert kept == [0, 1, 2, 3] and store.num_refused == 6
    assert size_bytes(tmp_path) <= 5000


def test_what_older_runs_left_makes_room_least_recently_used_first(tmp_path: Path) -> None:
    filled(tmp_path, limit_bytes=5000, numbers=range(4))
    store = TensorStore(tmp_path, limit_bytes=5000, setting="test")
    for age, number in enumerate((2, 0, 1, 3)):
        os.utime(store.path(content_key(number)), (1000 + age, 1000 + age))
    assert store.get(content_key(2)) is not None
    assert store.put(content_key(99), {"pixels": torch.zeros(1000, dtype=torch.uint8)})
    held = [number for number in (0, 1, 2, 3, 99) if content_key(number) in store]
    assert held == [1, 2, 3, 99]
    assert size_bytes(tmp_path) <= 5000


def write_many(folder: Path, worker: int) -> None:
    store = filled(folder, limit_bytes=40_000, numbers=range(20))
    for number in range(20):
        found = store.get(content_key(number))
        assert found is None or torch.equal(found["pixels"], torch.full((1000,), number, dtype=torch.uint8)), worker


def test_several_processes_write_whole_entries_within_the_limit(tmp_path: Path) -> None:
    workers = [multiprocessing.get_context("fork").Process(target=write_many, args=(tmp_path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert size_bytes(tmp_path) <= 40_000
    assert not [path for path in tmp_path.glob("??/*") if path.name.startswith(".")]


def test_full_disk_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(tmp_path, setting="test")

    def full(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert not store.put(content_key(1), {"pixels": torch.zeros(3)})
    assert store.get(content_key(1)) is None


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    assert open_tile_cache("off", limit_bytes=1) is None
    auto = open_tile_cache("auto", limit_bytes=1)
    assert auto is not None and auto.store.folder == tmp_path / "cache" / "tiles"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.tile_cache: .*file/sub cannot be written"):
        open_tile_cache(str(tmp_path / "file" / "sub"), limit_bytes=1)
