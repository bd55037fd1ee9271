"""Shortcut baselines: how well question words alone, or one picture's object alone, tell risky rows from twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mirage.data.row import Row

VERSION = "1"
FOLDS = 5
TRAIN_PARTS = ("train", "train_twins")
TEST_PARTS = ("easy", "hard", "twins")
VIEWS = {
    "question words": lambda row: row.question,
    "object in image 1": lambda row: _token(row, 0),
    "object in image 2": lambda row: _token(row, 1),
    "both objects, without their combination": lambda row: f"{_token(row, 0)}_1 {_token(row, 1)}_2",
}


def _token(row: Row, position: int) -> str:
    return row.tags["object_pair"].split(" + ")[position]


def twin_pairs(rows: Sequence[Row], splits: Sequence[str]) -> list[tuple[Row, Row]]:
    """(risky row, benign twin) pairs within splits; rows without a partner are left out."""
    risky = {row.id: row for row in rows if row.split in splits and row.twin_of is None}
    return [(risky[row.twin_of], row) for row in rows if row.split in splits and row.twin_of in risky]


def shortcut_accuracies(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Accuracy of logistic regression on each view of twin pairs; 0.5 is chance, because each pair has both labels.

    `train_folds`: 5-fold cross-validation over training pairs, a pair never split between folds. `test`: fitted on
    training pairs, scored on test pairs. Rounded to four digits.
    """
    # Imported here: they take a second, and a folder that is complete already does not need them.
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import GroupKFold

    train, test = twin_pairs(rows, TRAIN_PARTS), twin_pairs(rows, TEST_PARTS)
    train_y, test_y = (np.tile([1, 0], len(pairs)) for pairs in (train, test))
    groups = np.repeat(np.unique([pair[0].id for pair in train], return_inverse=True)[1], 2)
    results: dict[str, dict[str, float]] = {}
    for name, view in VIEWS.items():
        texts, test_texts = ([view(row) for pair in pairs for row in pair] for pairs in (train, test))
        vectorizer = CountVectorizer(token_pattern=r"\S+")
        features = vectorizer.fit_transform(texts)
        right = 0
        for fit, score in GroupKFold(FOLDS).split(features, train_y, groups):
            right += int((_fit(features[fit], train_y[fit]).predict(features[score]) == train_y[score]).sum())
        model = _fit(features, train_y)
        test_accuracy = float((model.predict(vectorizer.transform(test_texts)) == test_y).mean())
        results[name] = {"train_folds": round(right / len(train_y), 4), "test": round(test_accuracy, 4)}
    return results


def _fit(features: Any, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="liblinear", random_state=0).fit(features, labels)
