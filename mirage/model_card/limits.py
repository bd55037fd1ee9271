"""A card's limits: sentences that follow from the facts and the results, never from taste."""

from __future__ import annotations

from collections.abc import Sequence

from mirage.config.schema import SelectConfig
from mirage.evals.categories import canonical_category
from mirage.model_card.evaluations import Evaluation, group_tasks
from mirage.model_card.facts import CardFacts

# The paper's categories of risk (section 3.2, table 3).
RISK_CATEGORIES = ("Illegal Activity", "Violent", "Hate", "Self-Harm", "Privacy", "Erotic")
# Below this a model is for finding out whether a method works.
_SMALL_PARAMETERS = 200_000_000
_FEW_SAMPLES = 100


def limits(facts: CardFacts, evaluations: Sequence[Evaluation], *, select: SelectConfig) -> list[str]:
    """All that holds, the gravest first."""
    return [
        *_missing(evaluations, select),
        *[sentence for evaluation in evaluations for sentence in _of_evaluation(evaluation)],
        *_of_model(facts),
        *_of_data(facts, evaluations),
    ]


def _missing(evaluations: Sequence[Evaluation], select: SelectConfig) -> list[str]:
    if not evaluations:
        return ["Not evaluated: nothing was measured on these weights, neither safety nor anything else."]
    groups = group_tasks(evaluations[0].results, select)
    found = [
        f"{group} was not evaluated." for group in ("Safety", "Over-refusal", "General ability") if not groups[group]
    ]
    if evaluations[0].results.baseline is None:
        found.append("The untouched model was not measured beside it, so no change is shown.")
    return found


def _of_evaluation(evaluation: Evaluation) -> list[str]:
    results = evaluation.results
    found = [f"Worse than at step 0 beyond the allowed margin: {alarm}." for alarm in evaluation.alarms]
    for task, result in results.tasks.items():
        if not result.valid:
            found.append(f"{task} has no valid figure: {result.invalid_reason}.")
        elif result.num_unscored:
            found.append(f"{task}: {result.num_unscored} of {result.num_samples} answers have no verdict.")
    few = [f"{task} ({result.num_samples})" for task, result in results.tasks.items() if _is_small(result.num_samples)]
    if few:
        found.append(f"Fewer than {_FEW_SAMPLES} samples: {', '.join(few)}; see the intervals.")
    if results.max_samples is not None:
        found.append(f"Each task was measured on at most {results.max_samples} of its samples.")
    cut = [f"{task} ({result.num_truncated})" for task, result in results.tasks.items() if result.num_truncated]
    if cut:
        found.append(f"Answers were cut at {results.decoding.max_new_tokens} tokens in {', '.join(cut)}.")
    return [*found, _of_judge(results.judge.name, results.judge.notice)]


def _is_small(num_samples: int) -> bool:
    return 0 < num_samples < _FEW_SAMPLES


def _of_judge(name: str, notice: str) -> str:
    who = "Verdicts are by fixed rules, not by people" if name == "rule" else f"Verdicts are by the model {name}"
    return f"{who}. {notice}".rstrip(". ") + "."


def _of_model(facts: CardFacts) -> list[str]:
    found = []
    if facts.num_parameters is not None and facts.num_parameters < _SMALL_PARAMETERS and facts.lora is None:
        found.append(
            f"A model of {facts.num_parameters:,} parameters shows whether a method works; it is of no use to anybody "
            "with a question."
        )
    if facts.quantized:
        found.append("Training ran on a base quantised to 4 bits; full weights answer a little differently.")
    if facts.seed is not None:
        found.append(f"One training run with seed {facts.seed}: how much another seed would change is not known.")
    return found


def _of_data(facts: CardFacts, evaluations: Sequence[Evaluation]) -> list[str]:
    found = []
    languages = sorted({language for dataset in facts.datasets for language in dataset.languages})
    if languages:
        found.append(f"Training text is in: {', '.join(languages)}. Other languages were not trained on.")
    elif facts.datasets:
        found.append("The languages of the training text are not stated by the dataset's card.")
    trained = {canonical_category(name) for source in facts.sources for name in source.categories}
    if trained:
        found += _categories("No training rows of", [name for name in RISK_CATEGORIES if name not in trained])
    measured = {
        canonical_category(name)
        for evaluation in evaluations
        for result in evaluation.results.tasks.values()
        for name, group in result.by_category.items()
        if group.num_samples
    }
    if measured & set(RISK_CATEGORIES):
        found += _categories("Not measured on", [name for name in RISK_CATEGORIES if name not in measured])
    return [*found, *dict.fromkeys(limit for dataset in facts.datasets for limit in dataset.limitations)]


def _categories(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} these categories of risk: {', '.join(names)}."] if names else []
