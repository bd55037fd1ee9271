"""Category names: the spellings found in published files, mapped to the paper's (section 3.2, table 3)."""

from __future__ import annotations

# Published MIS files take their names from VLSBench's taxonomy, the paper's table shortens some of them.
_ALIASES: dict[str, str] = {
    "illegal activities": "Illegal Activity",
    "violence": "Violent",
    "hate speech": "Hate",
    "self harm": "Self-Harm",
    "sexual": "Erotic",
    "cybercrime": "Cybercrimes",
    "property crime": "Property Crimes",
    "drug related offenses": "Drug-Related Offenses",
    "human trafficking and exploitation": "Human Trafficking",
    "weapon related violence": "Weapon-Related Violence",
    "abuse and physical altercations": "Abuse and Physical Altercations",
    "abuse and physical alterations": "Abuse and Physical Altercations",
    "gender and sexual orientation discrimination": "Gender Discrimination",
    "psychological and disordered harm": "Psychological Harm",
    "identity theft and impersonation": "Identity Theft",
}
_PAPER_NAMES = (
    "Illegal Activity", "Violent", "Hate", "Self-Harm", "Privacy", "Erotic", "General",
    "Property Crimes", "Cybercrimes", "Drug-Related Offenses", "Human Trafficking", "Weapon-Related Violence",
    "Public Violence and Rioting", "Abuse and Physical Altercations", "Racial and Ethnic Discrimination",
    "Gender Discrimination", "Physical Self-Injury", "Psychological Harm", "Unauthorized Data Collection",
    "Identity Theft", "Erotic Visual Content",
)  # fmt: skip


def _key(name: str) -> str:
    return " ".join(name.replace("-", " ").replace("_", " ").casefold().split())


_BY_KEY = {_key(name): name for name in _PAPER_NAMES} | {_key(alias): name for alias, name in _ALIASES.items()}


def canonical_category(name: str) -> str:
    """The paper's name of a category or sub-category; a name the paper does not have is kept as it is, trimmed."""
    return _BY_KEY.get(_key(name), " ".join(name.split()))
