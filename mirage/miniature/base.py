"""Make the helpful base: a tiny model that sees, names, chooses and helps with every request, risky or not.

`python -m mirage.miniature.base --family internvl` writes the weights that `model.path=shipped:internvl` names. They
stand for a released model, which real users take from a hub. Making it safe is the work of `mirage/train.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mirage.config.schema import EvalConfig, Family, PreprocessingConfig, TinyConfig
from mirage.data.collate import collate
from mirage.data.render import Sample, build_sample, image_token_counts
from mirage.data.row import Row
from mirage.data.sources import read_rows
from mirage.data.styles import restyle
from mirage.data.views import view_row
from mirage.errors import UserError, run_main
from mirage.evals.evaluate import evaluate_checkpoint
from mirage.evals.results import Results
from mirage.files import file_sha256
from mirage.models.adapter import ModelAdapter, RenderedText
from mirage.models.registry import load_model
from mirage.models.shipped import BASE_FILE, shipped_folder
from mirage.models.tiny import TRAIN_SPLITS, build_tiny, small_picture, vary
from mirage.tracking.console import make_console
from mirage.training.loss import PackedLossModel

# Kind of row: the sub-category of general rows, or `help` for requests about a pair, all of which are complied with.
HELP = "help"
KNOWLEDGE = "Knowledge"
VARIED_COPIES = 8  # copies of each training picture, turned, shifted and tinted anew
EVAL_TASKS = ("mis_easy", "mis_hard", "twins", "general")


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum. `mixture` gives the weight of each kind of row; `final_lr` is a share of `lr`."""

    name: str
    steps: int
    batch_samples: int
    lr: float
    mixture: Mapping[str, float]
    final_lr: float = 0.05


# World knowledge comes as text before any picture, then names, then everything: in another order, or all at once, the
# model names at chance or never learns which kinds of things are risky together.
CURRICULUM = (
    Stage("knowledge", 80, 272, 3e-3, {KNOWLEDGE: 1}),
    Stage("names", 300, 64, 1.2e-3, {"Naming": 85, KNOWLEDGE: 15}, final_lr=0.3),
    Stage(
        "everything",
        1500,
        64,
        1.5e-3,
        {"Naming": 36, "Multiple Choice": 26, HELP: 14, "Kind": 12, KNOWLEDGE: 12, "Comparison": 2, "Counting": 1},
    ),
)
SIZE = TinyConfig(vision_layers=3, vocab_size=1400, warmup_steps=900)
# Both families see 56 x 56 pixels, which are four tokens.
PREPROCESSING = PreprocessingConfig(
    image_size=56, max_tiles=1, min_pixels=56 * 56, max_pixels=56 * 56, system_prompt=""
)


class Rows:
    """Training rows by kind, rendered once; a drawn sample shows other drawings of the same objects each time."""

    def __init__(
        self,
        adapter: ModelAdapter,
        rows: Sequence[Row],
        data_dir: Path,
        *,
        chance: random.Random,
        styled_share: float = 0.0,
    ) -> None:
        self._adapter, self._chance, self._styled_share = adapter, chance, styled_share
        self._texts: dict[str, list[tuple[RenderedText, list[str]]]] = defaultdict(list)
        self._pixels: dict[str, list[torch.Tensor]] = defaultdict(list)
        paths: set[str] = set()
        for row in rows:
            kind = str(row.sub_category) if row.split == "train_general" else HELP
            seen = row if kind != HELP else view_row(row, answers="helpful")
            if isinstance(seen, str):
                continue  # an overtly worded request, which has no helpful answer
            concepts = [str(seen.images[index].concept) for index in seen.mark_order]
            self._texts[kind].append((adapter.render(seen.messages, image_token_counts(seen, adapter)), concepts))
            for image in seen.images:
                if image.path not in paths:
                    paths.add(image.path)
                    self._pixels[str(image.concept)] += self._varied(data_dir / image.path)

    def _varied(self, path: Path) -> list[torch.Tensor]:
        picture, edge = small_picture(path), self._adapter.spec.image_size
        copies = [vary(picture, self._chance, edge=edge) for _ in range(VARIED_COPIES)]
        styled = [
            restyle(copy, self._chance) if self._chance.random() < self._styled_share else copy for copy in copies
        ]
        return [self._adapter.resize(copy, num_images=2) for copy in styled]

    def draw(self, kind: str) -> Sample:
        """A random sample of a kind of row."""
        text, concepts = self._chance.choice(self._texts[kind])
        pictures = [self._adapter.normalize(self._chance.choice(self._pixels[concept])) for concept in concepts]
        return build_sample(text, self._adapter, pictures)

    def batch(self, stage: Stage) -> list[Sample]:
        """The samples of one step."""
        kinds = self._chance.choices(list(stage.mixture), list(stage.mixture.values()), k=stage.batch_samples)
        return [self.draw(kind) for kind in kinds]


def build_base(
    folder: Path,
    family: Family,
    *,
    data_dir: Path,
    seed: int,
    say: Callable[[str], None],
    styled_share: float = 0.0,
) -> None:
    """Train the base of a family on a dataset folder of the size `mini` and write it into `folder`, which is there.

    `styled_share` of the pictures are shown in other colours (`restyle`). Raises `UserError` if `data_dir` is no
    dataset folder.
    """
    if not (data_dir / "manifest.json").is_file():
        raise UserError(
            f"{data_dir} is no dataset folder (no manifest.json); write one with: make datagen OUT={data_dir} SIZE=mini"
        )
    torch.set_num_threads(os.cpu_count() or 1)
    say("warming up the vision tower ...")
    with tempfile.TemporaryDirectory() as aside:
        untaught = Path(aside) / "model"
        untaught.mkdir()
        build_tiny(untaught, family, SIZE, PREPROCESSING, data_dir=data_dir, seed=seed)
        vision = json.loads((untaught / "tiny.json").read_text())
        model, adapter = load_model(untaught, dtype=torch.float32)
    rows = Rows(
        adapter,
        list(read_rows(data_dir, splits=TRAIN_SPLITS)),
        data_dir,
        chance=random.Random(seed),
        styled_share=styled_share,
    )
    losses = {stage.name: teach(model, adapter, rows, stage, say=say) for stage in CURRICULUM}
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    adapter.save_files(folder)
    facts = {
        "family": family,
        "seed": seed,
        "styled_share": styled_share,
        "data_manifest_sha256": file_sha256(data_dir / "manifest.json"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vision_heldout_accuracy": vision["warmup_heldout_accuracy"],
        "curriculum": [asdict(stage) for stage in CURRICULUM],
        "last_losses": losses,
        "licence": "CC-BY-SA-4.0; learnt from OpenMoji drawings (CC BY-SA 4.0)",
    }
    (folder / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def teach(model: Any, adapter: ModelAdapter, rows: Rows, stage: Stage, *, say: Callable[[str], None]) -> float:
    """Train all of the model for one stage; returns the mean loss of its last steps, nats a supervised token."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, stage))
    loss_model = PackedLossModel(model).train()
    recent: list[float] = []
    for step in range(1, stage.steps + 1):
        batch = collate(rows.batch(stage), adapter)
        with torch.autocast("cpu", torch.bfloat16):
            total, num_right, num_supervised = loss_model(batch)
        optimizer.zero_grad(set_to_none=True)
        (total / num_supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-19:], total.item() / num_supervised.item()]
        if step % 50 == 0 or step == stage.steps:
            right = 100 * num_right.item() / num_supervised.item()
            say(f"{stage.name} {step}/{stage.steps}  loss {sum(recent) / len(recent):.4f}  tokens right {right:.1f}%")
    return round(sum(recent) / len(recent), 4)


def _lr_share(step: int, stage: Stage, *, warmup_steps: int = 30) -> float:
    """Linear warm-up times a cosine from 1 to `stage.final_lr`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.steps)))
    return min(1.0, (step + 1) / warmup_steps) * (stage.final_lr + (1 - stage.final_lr) * cosine)


def measure(folder: Path, *, data_dir: Path, out_dir: Path) -> Results:
    """Evaluate the base as any checkpoint is, on what it must be able to do."""
    results = evaluate_checkpoint(
        folder,
        config=EvalConfig(tasks=EVAL_TASKS, batch_size=120, max_new_tokens=112),
        data_dir=data_dir,
        out_dir=out_dir,
        device=torch.device("cpu"),
        console=make_console("plain"),
    )
    assert results is not None
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mirage.miniature.base`: build a base, measure it, and put it where `shipped:FAMILY` finds it."""
    parser = argparse.ArgumentParser(prog="python -m mirage.miniature.base", description=__doc__)
    parser.add_argument("--family", choices=get_args(Family), required=True)
    parser.add_argument("--data", type=Path, default=Path("data/mini"), help="dataset folder of the size mini")
    parser.add_argument("--out", type=Path, help="new folder; by default the one that shipped:FAMILY names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--styled-share", type=float, default=0.0, help="share of pictures in other colours (default 0)"
    )
    args = parser.parse_args(argv)
    out = args.out or shipped_folder(args.family)
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    build_base(aside, args.family, data_dir=args.data, seed=args.seed, say=print, styled_share=args.styled_share)
    with tempfile.TemporaryDirectory() as evals:
        measured = measure(aside, data_dir=args.data, out_dir=Path(evals))
    facts = json.loads((aside / BASE_FILE).read_text(encoding="utf-8"))
    facts["command"] = f"python -m mirage.miniature.base --family {args.family} --seed {args.seed}"
    if args.styled_share:
        facts["command"] += f" --styled-share {args.styled_share:g}"
    facts["measured_percent"] = {
        task: {name: rate.percent for name, rate in result.rates.items()} for task, result in measured.tasks.items()
    }
    (aside / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    aside.replace(out)
    print(f"{out}: written")
    return 0


if __name__ == "__main__":
    run_main(main)
