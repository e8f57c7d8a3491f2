"""Forms of the files in a run directory, and their readers: what is damaged is refused by the file's name.

An unfinished last line of metrics.jsonl is the one thing that is repaired: the process was killed while it was written,
so it does not count, and a run that is continued cuts it off.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkdo_dist import documents
from rkdo_dist.documents import Check


class RunError(ValueError):
    """A run directory cannot be used as asked; the message names it and says what to do."""


# Scores of an evaluation, with their titles in tables and figures.
SCORE_TITLES = {
    "linear_accuracy": "linear accuracy (embedding)",
    "linear_accuracy_backbone": "linear accuracy (backbone)",
    "knn_accuracy": "k-NN accuracy (embedding)",
    "nmi": "NMI",
    "ari": "ARI",
    "neighbourhood": "neighbourhood preservation",
}
# The most informative of `yardsticks` (common metrics) in an evaluation: the same function for every objective.
COMMON_METRIC_TITLES = {
    "infonce": "InfoNCE at 0.5, held-out pairs",
    "infonce_positive_mass": "mass on the positive",
    "alignment": "alignment (lower: views closer)",
    "uniformity": "uniformity (lower: more spread)",
    "effective_rank": "effective rank of the embeddings",
    "own_loss": "own objective, held-out pairs",
    "own_loss_attained": "attained share of it",
}
# What the files hold, as far as anybody reads them.
_JUDGED = documents.maybe(documents.ANY_NUMBER)
STATUS = documents.shape(
    status=documents.TEXT, step=documents.COUNT, checkpoint_=documents.COUNT, message_=documents.TEXT,
    remark_=documents.TEXT,
)  # fmt: skip
_VALUE = documents.either(_JUDGED, documents.FLAG, documents.TEXT, documents.LIST, documents.OBJECT)
_STEP = documents.shape(
    step=documents.COUNT,
    epoch=documents.COUNT,
    loss=documents.maybe(documents.NUMBER),
    **{f"{name}_": _JUDGED for name in (
        "loss_at_uniform", "loss_at_ideal", "kl_1", "cross_entropy", "entropy_p", "positive_mass", "gradient_norm",
        "learning_rate", "temperature", "coupling", "row_positive", "row_entropy",
        "row_stored", "row_mass", "row_drift", "p_positive", "loss_scale", "replaced_samples",
    )},
    seconds_=documents.NUMBER,
    pairs_per_second_=documents.NUMBER,
    objective_=documents.TEXT,
    skipped_=documents.TEXT,
)  # fmt: skip
EVALUATION = documents.shape(
    step=documents.COUNT,
    protocol_=documents.TEXT,
    **{f"{name}_": _JUDGED for name in (*SCORE_TITLES, "knn_accuracy_backbone", "train_samples", "test_samples")},
    yardsticks_=documents.object_of(documents.either(_JUDGED, documents.TEXT, documents.OBJECT, documents.LIST)),
    unscored_=documents.maybe(documents.TEXT),
    warnings_=documents.list_of(documents.TEXT),
    weights_=documents.maybe(documents.TEXT),
    weights_are_=documents.TEXT,
)
ENVIRONMENT = documents.shape(
    versions_=documents.object_of(documents.maybe(documents.TEXT)),
    **{f"{name}_": documents.maybe(documents.TEXT) for name in (
        "python", "platform", "commit", "settings", "data", "version", "device", "strategy", "precision", "reduction",
        "code",
    )},
    arithmetic_=documents.OBJECT,
    world_size_=documents.COUNT,
    image_size_=documents.COUNT,
    callbacks_=documents.list_of(documents.TEXT),
    changed_by_=documents.list_of(documents.TEXT),
)  # fmt: skip
_ROW = documents.shape(
    sample=documents.COUNT,
    positive=documents.NUMBER,
    entropy_=documents.NUMBER,
    rest_=documents.NUMBER,
    nearest=documents.list_of(documents.row_of(documents.COUNT, documents.NUMBER)),
)
ROWS = documents.shape(step=documents.COUNT, samples=documents.COUNT, rows=documents.list_of(_ROW))
# Of a checkpoint, beside its tensors.
EXTRA = documents.shape(
    configuration_=documents.OBJECT,
    settings_=documents.TEXT,
    data_=documents.TEXT,
    skipped_in_a_row=documents.COUNT,
    **{f"{name}_": documents.OBJECT for name in ("early_stop", "collapse", "snapshots", "launch", "arithmetic")},
    loss_scale_=documents.object_of(documents.NUMBER),
)


def _step(value: Any, place: str) -> str:
    """A record of metrics.jsonl; what it has beside the known keys can be averaged and drawn, or is left alone."""
    return _STEP(value, place) or documents.object_of(_VALUE)(value, place or "it")


def read_object(path: Path, form: Check) -> dict[str, Any]:
    """A JSON object of a run directory, see `documents.read`.

    Raises:
        RunError: if the file holds anything else.
        OSError: if it cannot be read.
    """
    try:
        return documents.read(path, form)
    except documents.DamagedError as error:
        raise RunError(str(error)) from None


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, see `RunDirectory.steps`."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            where = f"{path}: line {number} is not the record of step {number}"
            try:
                record = documents.parsed(line, where, _step, "put the file back")
            except documents.DamagedError as error:
                raise RunError(str(error).replace(" is damaged: it is not a JSON object", "")) from None
            if record["step"] != number:
                raise RunError(f"{where}, but of step {record['step']}; put the file back")
            if record["loss"] is not None and type(record.get("loss_at_uniform")) not in (int, float):
                raise RunError(f"{where}: it has a loss, but not loss_at_uniform; put the file back")
            yield record
