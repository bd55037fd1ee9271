"""What the miniature experiment compares: each condition, its recipe, and what its last checkpoint is measured on."""

from __future__ import annotations

from dataclasses import dataclass

from mirage.config.schema import Family
from mirage.errors import UserError

FAMILIES: tuple[Family, ...] = ("internvl", "qwen2_vl")
FAMILY_TITLES: dict[str, str] = {"internvl": "InternVL, tiny", "qwen2_vl": "Qwen2-VL, tiny"}
SEEDS = (0, 1, 2)
BASE = "base"
MAIN = "mis_twins"

# Every run is measured on these.
MAIN_TASKS = (
    "mis_easy",
    "mis_hard",
    "mis_real",
    "twins",
    "general",
    "mis_multi",
    "multi_twins",
    "contrast",
    "contrast_twins",
    "mis_line",
    "line_twins",
    "line_general",
)
# The paper's Table 2: a harmless request with its pictures (`twins`), with white ones, in text alone.
PICTURE_PROBES = ("twins@white", "twins@text_only")
# One picture white at a time: what can be told from the other one and the words.
BLANK_PROBES = ("mis_hard@white1", "mis_hard@white2", "twins@white1", "twins@white2")
ORDER_PROBES = ("mis_hard@swap", "twins@swap")

# The run that a family does twice is also measured on the way, the second time: its learning curve.
CURVE_TASKS = ("mis_easy", "mis_hard", "twins", "general")
CURVE_EVERY_STEPS = 64
CURVE_MAX_SAMPLES = 120

QUICK_CONDITIONS = ("vlguard", "mis", MAIN)
QUICK_TASKS = ("mis_easy", "mis_hard", "twins", "general")
QUICK_MAX_SAMPLES = 80


@dataclass(frozen=True)
class Condition:
    """One way to train the helpful base. `letter` orders it in tables; `mirrors` names the paper's row and tables."""

    key: str
    letter: str
    title: str
    recipe: str | None
    mirrors: str
    probes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """What its last checkpoint is measured on."""
        return MAIN_TASKS + self.probes


CONDITIONS: dict[str, Condition] = {
    item.key: item
    for item in (
        Condition(BASE, "a", "Helpful base", None, "the untouched model (all tables)", PICTURE_PROBES),
        Condition(
            "textual",
            "b",
            "Textual SFT",
            "mini_internvl_textual",
            "Textual SFT (tables 1, 6, 15)",
            ("twins@black",),
        ),
        Condition(
            "vlguard", "c", "VLGuard refusals", "mini_internvl_vlguard", "VLGuard-P (tables 1, 2)", PICTURE_PROBES
        ),
        Condition(
            "vlguard_r", "d", "VLGuard-R", "mini_internvl_vlguard_r", "VLGuard-R (tables 1, 6, 15)", PICTURE_PROBES
        ),
        Condition("mis_nogeneral", "e", "MIRage, no general data", "mini_internvl_nogeneral", "MIRage* (table 6)"),
        Condition("mis", "f", "MIRage", "mini_internvl_mis_paper", "MIRage (tables 4, 6, 11)"),
        Condition(
            MAIN,
            "g",
            "MIRage with twins",
            "mini_internvl_mis",
            "none: the paper's data has no benign twins",
            BLANK_PROBES + ORDER_PROBES,
        ),
        Condition("sorry", "h", 'MIRage, "I\'m sorry" labels', "mini_internvl_sorry", 'w/ "I\'m sorry" (table 11)'),
        Condition("textonly", "i", "MIRage, text only", "mini_internvl_textonly", "text only (table 11)"),
        Condition(
            "direct",
            "j",
            "Direct labels with twins",
            "mini_internvl_direct",
            "none: reasoned labels against their last part alone",
        ),
    )
}
TRAINED = tuple(key for key, item in CONDITIONS.items() if item.recipe is not None)


def find_conditions(names: tuple[str, ...]) -> tuple[Condition, ...]:
    """The conditions of these names in the experiment's order. Raises `UserError` for an unknown one."""
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise UserError(f"there is no condition {unknown[0]!r}; conditions are {', '.join(CONDITIONS)}")
    return tuple(item for key, item in CONDITIONS.items() if key in names)


def family_overrides(family: Family) -> tuple[str, ...]:
    """What turns a recipe, written for InternVL, into the same one for another family."""
    return () if family == "internvl" else (f"model.family={family}", f"model.path={shipped(family)}")


def shipped(family: Family) -> str:
    """The name of the family's helpful base among the shipped weights."""
    return f"shipped:{family}"
