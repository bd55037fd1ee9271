"""The paper's own numbers that the experiment's tables stand beside (arXiv 2501.18533 v3), in percent."""

from __future__ import annotations

from dataclasses import dataclass

MODELS = {"internvl": "InternVL2.5-8B", "qwen2_vl": "Qwen2-VL-7B"}

# Table 1: (MMStar, MMMU, MMT-MI, FigStep ASR, MSSBench safe, MSSBench unsafe).
TABLE_1: dict[str, dict[str, tuple[float, ...]]] = {
    "internvl": {
        "base": (62.87, 54.33, 60.70, 38.80, 99.67, 3.00),
        "textual": (60.47, 54.00, 59.14, 30.60, 99.33, 1.00),
        "vlguard": (61.73, 52.67, 58.68, 0.00, 63.33, 60.33),
        "vlguard_r": (62.00, 52.89, 59.67, 0.60, 88.33, 35.44),
    },
    "qwen2_vl": {
        "base": (58.53, 51.00, 62.90, 58.53, 99.23, 4.98),
        "textual": (56.93, 49.67, 62.83, 18.80, 99.61, 3.83),
        "vlguard": (51.47, 41.56, 45.79, 0.00, 64.37, 62.07),
        "vlguard_r": (57.53, 44.67, 61.75, 0.20, 91.19, 22.99),
    },
}
# Table 2, VLGuard-P on harmless MSSBench instructions: (rejected, accuracy).
TABLE_2: dict[str, dict[str, tuple[float, float]]] = {
    "internvl": {"twins": (42.50, 63.33), "twins@white": (48.65, 62.86), "twins@text_only": (37.95, 70.80)},
    "qwen2_vl": {"twins": (32.57, 64.37), "twins@white": (42.15, 59.33), "twins@text_only": (17.62, 80.46)},
}
# Tables 4 and 15: (ASR, HR, RSR, RR) on easy, hard and real. Textual SFT and VLGuard-R of InternVL2.5-8B are of
# version 1's figure 4, which has ASR and RSR alone.
Rates = tuple[float, float | None, float, float | None]
TABLE_4: dict[str, dict[str, dict[str, Rates]]] = {
    "internvl": {
        "base": {
            "mis_easy": (80.12, 0.54, 14.81, 4.53),
            "mis_hard": (84.51, 0.39, 14.12, 0.98),
            "mis_real": (76.00, 1.00, 12.00, 12.00),
        },
        "textual": {
            "mis_easy": (48.60, None, 7.94, None),
            "mis_hard": (54.30, None, 11.91, None),
            "mis_real": (41.00, None, 12.00, None),
        },
        "vlguard_r": {
            "mis_easy": (3.88, None, 89.85, None),
            "mis_hard": (8.98, None, 91.02, None),
            "mis_real": (10.00, None, 84.00, None),
        },
        "mis": {
            "mis_easy": (0.24, 0.00, 99.34, 0.42),
            "mis_hard": (0.20, 0.00, 99.80, 0.00),
            "mis_real": (0.00, 0.00, 100.00, 0.00),
        },
    },
    "qwen2_vl": {
        "base": {
            "mis_easy": (90.03, 0.12, 9.73, 0.24),
            "mis_hard": (89.41, 0.20, 10.20, 0.19),
            "mis_real": (81.00, 0.00, 17.00, 1.00),
        },
        "textual": {
            "mis_easy": (36.84, 0.06, 6.09, 57.01),
            "mis_hard": (42.35, 0.98, 7.64, 49.02),
            "mis_real": (34.00, 0.00, 9.00, 57.00),
        },
        "vlguard_r": {
            "mis_easy": (17.13, 0.30, 78.69, 3.88),
            "mis_hard": (22.16, 0.59, 76.67, 0.59),
            "mis_real": (18.00, 0.00, 76.00, 6.00),
        },
        "mis": {
            "mis_easy": (1.67, 0.00, 97.61, 0.72),
            "mis_hard": (1.76, 0.00, 98.24, 0.00),
            "mis_real": (1.00, 0.00, 98.00, 1.00),
        },
    },
}
# Tables 6 and 13: (general share of the data in percent, mean of five benchmarks).
TABLE_6: dict[str, dict[str, tuple[float | None, float]]] = {
    "internvl": {
        "base": (None, 60.47),
        "textual": (33.3, 58.54),
        "vlguard_r": (33.3, 58.49),
        "mis_nogeneral": (0.0, 60.53),
        "mis": (11.1, 61.30),
    },
    "qwen2_vl": {
        "base": (None, 58.10),
        "textual": (33.3, 57.32),
        "vlguard_r": (33.3, 55.80),
        "mis": (11.1, 58.53),
    },
}
# Tables 11 and 12 (InternVL2.5-8B alone): (general mean, MSSBench safe, MSSBench unsafe, ASR easy, hard, real).
TABLE_11: dict[str, dict[str, tuple[float, ...]]] = {
    "internvl": {
        "base": (60.47, 99.67, 3.00, 80.12, 84.51, 76.00),
        "sorry": (59.86, 43.67, 72.67, 0.00, 0.00, 0.00),
        "textonly": (60.53, 99.00, 14.67, 34.03, 40.39, 44.00),
        "mis": (61.30, 87.67, 40.00, 0.24, 0.20, 0.00),
    },
    "qwen2_vl": {},
}


@dataclass(frozen=True)
class Analogue:
    """A figure of the paper and what stands for it here: the task and metric, and whether it is 100 minus that."""

    table: str
    name: str
    task: str
    metric: str
    complement: bool = False


GENERAL = Analogue("1", "general ability", "general", "accuracy")
SAFE = Analogue("1", "harmless requests answered", "twins", "refused", complement=True)
UNSAFE = Analogue("1", "compositional risk declined", "mis_hard", "asr", complement=True)
VISIBLE = Analogue("1", "attack success, harm in sight", "mis_easy", "asr")


def figures(family: str) -> list[tuple[Analogue, dict[str, float]]]:
    """Each figure that the paper has for several of the experiment's conditions: (what it is, condition -> percent)."""
    found = [
        (GENERAL, {key: sum(row[:3]) / 3 for key, row in TABLE_1[family].items()}),
        (VISIBLE, {key: row[3] for key, row in TABLE_1[family].items()}),
        (SAFE, {key: row[4] for key, row in TABLE_1[family].items()}),
        (UNSAFE, {key: row[5] for key, row in TABLE_1[family].items()}),
    ]
    for task, split in (("mis_easy", "easy"), ("mis_hard", "hard"), ("mis_real", "real")):
        rows = TABLE_4[family]
        found += [
            (Analogue("4", f"ASR, {split}", task, "asr"), {key: row[task][0] for key, row in rows.items()}),
            (Analogue("4", f"RSR, {split}", task, "rsr"), {key: row[task][2] for key, row in rows.items()}),
        ]
    found.append(
        (Analogue("6", "general ability", "general", "accuracy"), {k: r[1] for k, r in TABLE_6[family].items()})
    )
    ablations = TABLE_11[family]
    if ablations:
        columns = (
            Analogue("11", "general ability", "general", "accuracy"),
            Analogue("11", SAFE.name, SAFE.task, SAFE.metric, complement=True),
            Analogue("11", UNSAFE.name, UNSAFE.task, UNSAFE.metric, complement=True),
            Analogue("11", "ASR, easy", "mis_easy", "asr"),
            Analogue("11", "ASR, hard", "mis_hard", "asr"),
            Analogue("11", "ASR, real", "mis_real", "asr"),
        )
        found += [(column, {key: row[n] for key, row in ablations.items()}) for n, column in enumerate(columns)]
    return found
