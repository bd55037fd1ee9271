"""A user's mistake at the real command: one message, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_train_resume import SMALL, environment


def train(root: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "mirage/train.py", *arguments],
        cwd=root,
        env=environment(cache),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def assert_one_message(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for part in parts:
        assert part in done.stderr


def test_misspelt_key_and_unknown_recipe(repo_root, tmp_path):
    run_dir = f"run_dir={tmp_path / 'run'}"
    assert_one_message(train(repo_root, tmp_path, "recipe=tiny_internvl_mis", "train.lrr=1", run_dir), "train.lr")
    assert_one_message(train(repo_root, tmp_path, "recipe=tiny_intern", run_dir), "tiny_internvl_mis")
    assert not (tmp_path / "run").exists()


def test_no_weights(repo_root, shapes, tmp_path):
    done = train(repo_root, tmp_path, "recipe=internvl_mis", f"data.dir={shapes}", f"run_dir={tmp_path / 'run'}")
    assert_one_message(done, "model.path", "OpenGVLab/InternVL2_5-8B", "tiny_internvl_mis", "make datagen")


def test_no_data(repo_root, tmp_path):
    done = train(repo_root, tmp_path, "recipe=tiny_internvl_mis", f"data.dir={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert_one_message(done, "make datagen")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_corrupt_picture_stops_the_run_at_its_row(repo_root, shapes, tmp_path, workers):
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    for picture in data.glob("images/*/*.png"):
        picture.write_bytes(picture.read_bytes()[:-60])
    run_dir = tmp_path / "run"
    done = train(
        repo_root,
        tmp_path / "cache",
        "recipe=tiny_internvl_mis",
        f"data.dir={data}",
        f"run_dir={run_dir}",
        f"data.num_workers={workers}",
        *SMALL,
    )
    assert_one_message(done, "rows.jsonl:", "cannot be decoded", "restore the file")
    assert not list(run_dir.glob("checkpoint-*"))
