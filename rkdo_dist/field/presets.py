"""Named objectives: the three choices and the defaults of each. Without torch, so that `--help` answers at once.

An objective is who supervises (p(0)), how closeness is measured (the affinity that q is the softmax of), and how p
recurs. Everything that names objectives takes names, titles, labels and colours from `PRESETS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

AFFINITIES = ("cosine", "gaussian", "student", "clusters")
RECURSIONS = ("none", "in_batch", "persistent", "restart")
NORMALISERS = ("row", "field")
SUPERVISOR_GRADIENTS = ("flow", "stop")
CLOCKS = ("depth", "training")

# Defaults of all objectives, those of the paper's released code; a preset may have its own.
DEPTH, COUPLING, TEMPERATURE, COOLING = 3, 0.5, 0.5, 0.1
# Of other affinities than the cosine: no temperature beside their own width, width, and tails as in I-Con's t-SimCLR.
PLAIN_TEMPERATURE, SIGMA, DEGREES_OF_FREEDOM = 1.0, 1.0, 2.0


@dataclass(frozen=True)
class Relation:
    """How p recurs with restart (`field.relation`). The settings of these are in `RELATION`.

    Attributes:
        weight: a, the share of the relation in p, in [0, 1); up to 1 where the positive is apart.
        form: "mixed": KL(p || q) of p = (1 - a) e + a r; "apart": (1 - a) KL(e || q) + a KL(r || q without i).
        teacher: whose keys the relation is made of: "student", "ema" of its weights, or "snapshot": the student's
            embeddings of all samples, taken now and then (`field.snapshot`).
        temperature: tau_T of the relation.
        view: that the teacher sees: "strong", "weak" or "plain"; "" where it must be said.
        columns: "batch", or a "queue" of the teacher's keys or a "bank" of one for every sample, which are then the
            columns of q too.
        queue: keys in it.
        neighbours: k nearest columns that the relation is made of; 0: all.
        mutual: whether two neighbours must be that of each other.
        confidence: of a row, which multiplies its weight: "none", "entropy" of its relation, or "agreement" with the
            row before.
        decay: of the average that the teacher "ema" is, where `train.ema` does not say it; None: it must.
        every: epochs between snapshots.
        momentum, mean: of the memory of snapshots' rows, see `field.relation.remembered`.
    """

    weight: float = 0.5
    form: str = "mixed"
    teacher: str = "student"
    temperature: float = 0.05
    view: str = ""
    columns: str = "batch"
    queue: int = 4096
    neighbours: int = 0
    mutual: bool = False
    confidence: str = "none"
    decay: float | None = None
    every: int = 5
    momentum: float = 0.0
    mean: str = "arithmetic"

    @property
    def own_keys(self) -> bool:
        """Whether the student's second view serves as the teacher's, so that nothing more is embedded."""
        return self.teacher == "student" and self.view == "strong" and self.columns == "batch"


RELATION = {  # settings of the section `field` and what they are here; the view is views.teacher
    "relation": "form",
    "relation_weight": "weight",
    "teacher": "teacher",
    "teacher_temperature": "temperature",
    "columns": "columns",
    "queue": "queue",
    "neighbours": "neighbours",
    "mutual": "mutual",
    "confidence": "confidence",
    "snapshot_every": "every",
    "relation_momentum": "momentum",
    "relation_mean": "mean",
}


@dataclass(frozen=True)
class Preset:
    """A named objective.

    Attributes:
        label: its name in reports and figures.
        title: one line for help.
        supervisor: who supervises, p(0): "identity" (the other view), "labels" (all samples of the same label), "rows"
            (rows that are given), or the name of a function in `field.supervisors.LISTED`.
        recursion: how p recurs, one of `RECURSIONS`.
        affinity: how closeness is measured, one of `AFFINITIES`.
        temperature: where none is given, with this affinity.
        pairing: where none is given, cross, symmetric or joint.
        fixes_pairing: whether another pairing would be another objective.
        debias: uniform share of p(0) where none is given.
        variant_of: the preset that becomes this one when p is to recur otherwise; "" for one chosen by its own name.
        relation: of a recursion with restart, where nothing else is given.
    """

    label: str
    title: str
    supervisor: str = "identity"
    recursion: str = "none"
    affinity: str = "cosine"
    temperature: float = TEMPERATURE
    pairing: str = "cross"
    fixes_pairing: bool = False
    debias: float = 0.0
    variant_of: str = ""
    relation: Relation | None = None


SUPERVISORS = ("identity", "labels", "neighbours")  # by name; a file's rows besides
PRESETS: dict[str, Preset] = {
    "rkdo": Preset(
        label="RKDO",
        title="the other view supervises, and p recurs within the step",
        recursion="in_batch",
    ),
    "persistent": Preset(
        label="RKDO, persistent",
        title="rows of p live across training steps",
        supervisor="rows",
        recursion="persistent",
        fixes_pairing=True,
        variant_of="rkdo",
    ),
    "restart": Preset(
        label="RKDO, restart",
        title="the other view shares p with a relation that a teacher sees",
        temperature=0.1,
        recursion="restart",
        fixes_pairing=True,
        variant_of="rkdo",
        relation=Relation(),
    ),
    "icon": Preset(
        label="I-Con",
        title="the other view supervises, with a uniform share",
        debias=0.2,
    ),
    "infonce": Preset(
        label="InfoNCE",
        title="the other view supervises",
    ),
    "simclr": Preset(
        label="SimCLR",
        title="InfoNCE over the columns of both views (NT-Xent)",
        pairing="joint",
        fixes_pairing=True,
    ),
    "clip": Preset(
        label="CLIP",
        title="InfoNCE in both directions",
        temperature=0.07,
        pairing="symmetric",
        fixes_pairing=True,
    ),
    "supcon": Preset(
        label="SupCon",
        title="samples of the same label supervise, over the columns of both views",
        supervisor="labels",
        temperature=0.1,
        pairing="joint",
        fixes_pairing=True,
    ),
    "sne": Preset(
        label="SNE",
        title="the other view supervises, closeness is a gaussian of the distance",
        affinity="gaussian",
        temperature=PLAIN_TEMPERATURE,
    ),
    "t-simclr": Preset(
        label="t-SimCLR",
        title="SimCLR whose closeness is Student's t of the distance",
        affinity="student",
        temperature=PLAIN_TEMPERATURE,
        pairing="joint",
        fixes_pairing=True,
    ),
    "clusters": Preset(
        label="InfoNCE clusters",
        title="the other view supervises, closeness is to share clusters; both with a uniform share",
        affinity="clusters",
        temperature=PLAIN_TEMPERATURE,
        debias=0.2,
    ),
    "sce": Preset(
        label="SCE",
        title="the other view, and the relation of an averaged teacher's key to a queue (Denize et al. 2023)",
        recursion="restart",
        temperature=0.1,
        fixes_pairing=True,
        relation=Relation(0.5, teacher="ema", temperature=0.05, view="weak", columns="queue", decay=0.99),
    ),
    "ressl": Preset(
        label="ReSSL",
        title="that relation alone (Zheng et al. 2021)",
        recursion="restart",
        temperature=0.1,
        fixes_pairing=True,
        relation=Relation(1.0, "apart", "ema", 0.04, "weak", "queue", decay=0.99),
    ),
    "co2": Preset(
        label="CO2",
        title="InfoNCE over a queue, and ten times that relation (Wei et al. 2020)",
        recursion="restart",
        temperature=0.07,
        fixes_pairing=True,
        relation=Relation(10 / 11, "apart", "ema", 0.04, "strong", "queue", 65536, decay=0.999),
    ),
    "snapshot": Preset(
        label="SimCLR, snapshots",
        title="SimCLR whose second views may be those of mutual neighbours at the last snapshot",
        recursion="restart",
        temperature=0.2,
        pairing="joint",
        relation=Relation(0.3, teacher="snapshot", view="plain", neighbours=20, mutual=True),
    ),
}


def temperature_of(preset: Preset, affinity: str) -> float:
    """The temperature where none is given: the preset's, with another affinity than its own what goes with that."""
    if affinity == preset.affinity:
        return preset.temperature
    return TEMPERATURE if affinity == "cosine" else PLAIN_TEMPERATURE


def named(objective: str, recursion: str = "in_batch") -> str:
    """The name of what `field.objective` and `field.recursion` ask for: a variant of RKDO where p persists."""
    for name, preset in PRESETS.items():
        if preset.variant_of == objective and preset.recursion == recursion:
            return name
    return objective


def own_setting(preset: Preset, name: str, affinity: str | None = None) -> Any:
    """What a preset has for `temperature`, `pairing`, `affinity` or a setting of its relation; None if nothing.

    Args:
        affinity: that is given, on which the temperature depends.
    """
    if name == "temperature":
        return temperature_of(preset, affinity or preset.affinity)
    if name in RELATION and preset.relation is not None:
        return getattr(preset.relation, RELATION[name])
    if name == "delivery":
        return "sampled" if preset.relation is not None and preset.relation.teacher == "snapshot" else "restricted"
    return "batch" if name == "columns" else getattr(preset, name, None)


def choices() -> list[str]:
    """Names that an objective is chosen by."""
    return [name for name, preset in PRESETS.items() if not preset.variant_of]


def titles() -> str:
    """What each of `choices` is, for help."""
    return "; ".join(f"{name}: {PRESETS[name].title}" for name in choices())


def own(name: str) -> str:
    """The values of `temperature`, `pairing` or `affinity` that presets have where none is given, for help."""
    general = getattr(PRESETS["rkdo"], name)
    special = (f"{key} {getattr(PRESETS[key], name)}" for key in choices() if getattr(PRESETS[key], name) != general)
    return "; ".join([f"{general}", *special])
