"""Shortcut gate: linear baselines on words, one picture or a bag of objects must not tell risky rows from twins."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirage.data.row import Row
from mirage.errors import UserError

VERSION = "2"
FOLDS = 5
CHANCE = 0.5
MARGIN = 0.05
Z = 4.26
"""Standard errors that a baseline may be off by luck. A figure of n pairs at chance has a standard error of at most
0.5/sqrt(n), as the two rows of a pair are one draw. About 60 figures a build, two-sided normal tail 2e-5 each: a sound
build fails once in about 800. Above 1,815 pairs this is less than MARGIN, which then is what counts."""
THUMBNAIL_PIXELS = 8

Pairs = list[tuple[Row, Row]]
Features = Callable[[Row], str] | Callable[[Row], np.ndarray]
NOT_APPLICABLE = {
    "contrast rows with protective intent": "their words are meant to tell the decision",
    "real": "photographs have no benign twins",
    "general and train_general": "they carry no decision",
    "overt rows of train": "their words are meant to tell the decision; they have no twins",
}


def twin_pairs(rows: Sequence[Row], splits: Sequence[str]) -> Pairs:
    """(risky row, benign twin) pairs within splits; rows without a partner are left out."""
    risky = {row.id: row for row in rows if row.split in splits and row.twin_of is None}
    return [(risky[row.twin_of], row) for row in rows if row.split in splits and row.twin_of in risky]


def _objects(row: Row) -> list[str]:
    return row.tags.get("objects", row.tags["object_pair"]).split(" + ")


def _object_at(row: Row, position: int) -> str:
    objects = _objects(row)
    return objects[position] if position < len(objects) else ""


def _placed(row: Row) -> str:
    return " ".join(f"{slug}_at_{place}" for place, slug in enumerate(_objects(row), 1))


def _bag(row: Row) -> str:
    return " ".join(sorted(_objects(row)))


class Thumbnails:
    """Pictures as 8 x 8 colour thumbnails, flat float32 in 0..1; each file is read once."""

    def __init__(self, open_picture: Callable[[str], Path]) -> None:
        self.open_picture = open_picture
        self.cache: dict[str, np.ndarray] = {}

    def __call__(self, row: Row, position: int) -> np.ndarray:
        path = row.images[position].path
        if path not in self.cache:
            with Image.open(self.open_picture(path)) as image:
                small = image.convert("RGB").resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.BOX)
            self.cache[path] = np.asarray(small, dtype=np.float32).reshape(-1) / 255
        return self.cache[path]


def _views(num_objects: int, thumbnails: Thumbnails | None) -> dict[str, Features]:
    views: dict[str, Features] = {"question words": lambda row: row.question}
    for position in range(num_objects):
        views[f"object {position + 1}"] = partial(_object_at, position=position)
    views["objects with their places"] = _placed
    views["bag of objects"] = _bag
    if thumbnails is not None:
        for position in range(num_objects):
            views[f"pixels of image {position + 1}"] = partial(thumbnails, position=position)
    return views


@dataclass(frozen=True)
class _Group:
    """Twin pairs of training and of its tests (by name), and what baselines see of them."""

    train_name: str
    train: Pairs
    tests: Mapping[str, Pairs]
    views: Mapping[str, Features]


def margin_of(num_pairs: int) -> float:
    """How far from chance a figure over so many pairs may be."""
    return round(min(CHANCE, max(MARGIN, Z * 0.5 / num_pairs**0.5)), 4) if num_pairs else CHANCE


def shortcut_figures(
    rows: Sequence[Row], *, open_picture: Callable[[str], Path] | None = None
) -> dict[str, dict[str, Any]]:
    """Figure -> {pairs, margin, accuracies by view}, of linear classifiers on twin pairs; 0.5 is chance.

    'in folds' is 5-fold cross-validation, a pair never split between folds; 'A to B' is fitted on A and scored on B.
    Words and objects go to logistic regression as counts, pixels to a ridge classifier; pictures are found by
    `open_picture` (path in the dataset -> file), and pixels are left out without it. Rounded to four digits.
    """
    thumbnails = Thumbnails(open_picture) if open_picture is not None else None
    two, many = _views(2, thumbnails), _views(4, None)
    tests = {"test": twin_pairs(rows, ("easy", "hard", "twins")), "line": twin_pairs(rows, ("line",))}
    groups = [
        _Group("train", twin_pairs(rows, ("train", "train_twins")), tests, two),
        _Group("train_multi", twin_pairs(rows, ("train_multi",)), {"multi": twin_pairs(rows, ("multi",))}, many),
        _Group(
            "train_contrast",
            twin_pairs(rows, ("train_contrast",)),
            {"contrast": twin_pairs(rows, ("contrast",))},
            _views(2, None),
        ),
    ]
    figures: dict[str, dict[str, Any]] = {}
    for group in groups:
        figures |= _group_figures(group)
    return figures


def _group_figures(group: _Group) -> dict[str, dict[str, Any]]:
    parts = {f"{group.train_name} to {name}": pairs for name, pairs in group.tests.items()}
    kinds = sorted({risky.tags.get("holdout", "pair") for risky, _ in group.tests.get("test", ())})
    if len(kinds) > 1:
        for kind in kinds:
            parts[f"train to test, new {kind.replace('_', ' ')}"] = [
                pair for pair in group.tests["test"] if pair[0].tags["holdout"] == kind
            ]
    accuracies: dict[str, dict[str, float]] = defaultdict(dict)
    for name, view in group.views.items():
        data = _Data.of(group.train, view)
        for split, pairs in {group.train_name: group.train, **group.tests}.items():
            if len(pairs) >= FOLDS:
                own = data if pairs is group.train else _Data.of(pairs, view)
                accuracies[f"{split}, in folds"][name] = own.fold_accuracy(balanced_folds(pairs))
        if group.train:
            model = data.fitted()
            for part, pairs in parts.items():
                if pairs:
                    accuracies[part][name] = model(pairs)
    own_sizes = {f"{name}, in folds": pairs for name, pairs in {group.train_name: group.train, **group.tests}.items()}
    sizes = own_sizes | parts
    return {
        part: {"pairs": len(sizes[part]), "margin": margin_of(len(sizes[part])), "accuracies": found}
        for part, found in accuracies.items()
    }


@dataclass(frozen=True)
class _Data:
    """Features and labels of pairs: rows 2i and 2i + 1 are the risky row and the twin of pair i."""

    view: Features
    features: Any
    labels: np.ndarray
    vectorizer: Any

    @classmethod
    def of(cls, pairs: Pairs, view: Features) -> _Data:
        # Imported here: it takes a second, and a folder that is complete already does not need it.
        from sklearn.feature_extraction.text import CountVectorizer

        labels = np.tile([1, 0], len(pairs))
        seen = [view(row) for pair in pairs for row in pair]
        if not seen or not isinstance(seen[0], str):
            return cls(view, np.array(seen), labels, None)
        vectorizer = CountVectorizer(token_pattern=r"\S+")
        return cls(view, vectorizer.fit_transform(seen) if any(seen) else np.zeros((len(seen), 1)), labels, vectorizer)

    def fold_accuracy(self, folds: np.ndarray) -> float:
        """Accuracy over all rows, each scored by a classifier fitted without its pair's fold."""
        by_row, right = np.repeat(folds, 2), 0
        for fold in np.unique(folds):
            inside = by_row == fold
            model = _fit(self.features[~inside], self.labels[~inside])
            right += int((model.predict(self.features[inside]) == self.labels[inside]).sum())
        return round(right / len(self.labels), 4)

    def fitted(self) -> Callable[[Pairs], float]:
        """Fit on all rows; returns the accuracy on other pairs."""
        model = _fit(self.features, self.labels)

        def accuracy(pairs: Pairs) -> float:
            seen = [self.view(row) for pair in pairs for row in pair]
            features = np.array(seen) if self.vectorizer is None else self.vectorizer.transform(seen)
            return round(float((model.predict(features) == np.tile([1, 0], len(pairs))).mean()), 4)

        return accuracy


def _fit(features: Any, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    if isinstance(features, np.ndarray):
        return RidgeClassifier(alpha=1.0).fit(features, labels)
    return LogisticRegression(solver="liblinear", random_state=0).fit(features, labels)


def balanced_folds(pairs: Pairs) -> np.ndarray:
    """Fold of each pair, int, chosen so that within a fold each object at each place is about as often risky as benign.

    The whole set is balanced in that way. Folds cut at random are not, and what one of them has too much of, the rest
    has too little: a classifier fitted on the rest would be wrong more often than right, which hides small shortcuts.
    """
    tilt: list[Counter[tuple[int, str]]] = [Counter() for _ in range(FOLDS)]
    sizes, folds = [0] * FOLDS, np.zeros(len(pairs), dtype=int)
    room = -(-len(pairs) // FOLDS)
    for number, (risky, twin) in enumerate(pairs):
        change: Counter[tuple[int, str]] = Counter(enumerate(_objects(risky)))
        change.subtract(enumerate(_objects(twin)))
        cost = [sum(tilt[fold][key] * sign for key, sign in change.items()) for fold in range(FOLDS)]
        fold = min((f for f in range(FOLDS) if sizes[f] < room), key=lambda f: (cost[f], sizes[f]))
        tilt[fold].update(change)
        sizes[fold] += 1
        folds[number] = fold
    return folds


def check_shortcuts(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError naming figure, view, accuracy and margin if a figure is further from chance than its margin."""
    found = [
        (abs(accuracy - CHANCE) - figure["margin"], name, view, accuracy, figure["margin"])
        for name, figure in figures.items()
        for view, accuracy in figure["accuracies"].items()
        if abs(accuracy - CHANCE) > figure["margin"]
    ]
    if not found:
        return
    _, name, view, accuracy, margin = max(found)
    more = f"; {len(found) - 1} more figures are outside theirs" if len(found) > 1 else ""
    raise UserError(
        f"a shortcut tells risky rows from their twins, so nothing was written: a linear classifier that sees only "
        f"'{view}' is right on {accuracy:.1%} of '{name}', outside 50% +/- {margin:.1%}{more}. "
        "Balance the sentences or objects that were changed last between risky rows and twins"
    )
