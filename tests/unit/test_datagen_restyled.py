"""A dataset with training pictures in other colours: what changes, what stays, and that it is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen.build import make_dataset
from data_gen.cli import main
from data_gen.restyled import publish_restyled
from data_gen.store import read_manifest
from data_gen.taxonomy.facts import load_taxonomy
from mirage.data.sources import read_rows
from mirage.errors import UserError
from tests.support.datagen import tiny_settings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restyled") / "mis"
    make_dataset(folder, taxonomy=load_taxonomy(), settings=tiny_settings(), num_workers=1)
    return folder


def test_a_share_of_the_training_pictures_changes_and_nothing_else(dataset: Path, tmp_path: Path) -> None:
    target = tmp_path / "styled"
    assert main(["restyle", "--out", str(dataset), "--to", str(target), "--share", "0.5"]) == 0
    assert main(["verify", "--out", str(target)]) == 0
    before, after = list(read_rows(dataset)), list(read_rows(target))
    assert [row.id for row in before] == [row.id for row in after]
    assert [row.messages for row in before] == [row.messages for row in after]
    shown = {}
    for old, new in zip(before, after, strict=True):
        for was, now in zip(old.images, new.images, strict=True):
            assert shown.setdefault(was.path, now.path) == now.path, "one picture has two forms"
            if now.path != was.path:
                assert now.source.generator.endswith(", restyled") and now.attribution.endswith("; colours changed")
            else:
                assert now == was
    trained = {image.path for row in before if row.split.startswith("train") for image in row.images}
    changed = {was for was, now in shown.items() if was != now}
    assert changed <= trained and 0.3 < len(changed) / len(trained) < 0.7
    for was in changed:
        assert np.any(np.asarray(Image.open(dataset / was)) != np.asarray(Image.open(target / shown[was])))
    made = read_manifest(target)["restyled"]
    assert made == {"of": read_manifest(dataset)["content_sha256"], "share": 0.5, "seed": 0}


def test_the_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    first, second = (publish_restyled(dataset, tmp_path / name, share=0.3, seed=4) for name in "ab")
    assert first.manifest == second.manifest and first.num_restyled == second.num_restyled > 0
    other = publish_restyled(dataset, tmp_path / "c", share=0.3, seed=5)
    assert other.manifest["files"] != first.manifest["files"]


@pytest.mark.parametrize(("share", "message"), [("0", "above 0 and at most 1, found 0"), ("1.5", "found 1.5")])
def test_a_share_that_is_none_is_refused(share: str, message: str, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main(["restyle", "--out", str(dataset), "--to", str(tmp_path / "x"), "--share", share])
    with pytest.raises(UserError, match="exists; name another folder"):
        main(["restyle", "--out", str(dataset), "--to", str(tmp_path)])
