"""What every test runs under: no network, no keys of the person who runs them, no GPU test without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.dataset import write_dataset

ROOT = Path(__file__).resolve().parent.parent

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side on every core; threads of theirs would wait for each other, busily.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NETRC"] = os.devnull
os.environ["WANDB_SILENT"] = "true"
for _name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "HF_TOKEN"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m gpu` on a machine without one skips with the reason instead of failing."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset folder of coloured shapes, every split present."""
    return write_dataset(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Path]:
    """Folders of small untrained models, by family."""
    from tests.support.models import build

    root = tmp_path_factory.mktemp("tiny")
    return {
        "internvl": build(root / "internvl", "internvl", shapes),
        "qwen2_vl": build(root / "qwen", "qwen2_vl", shapes),
    }
