"""What the statements of the paper's section 6.2 need beyond what they say, each with a concrete counterexample.

A finding holds numbers that can be checked by hand.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from examples.theory import statements
from examples.theory.statements import Field
from rkdo_dist.field.objectives import Objective

FALSE, EMPTY, UNMET, NEEDS, MORE = KINDS = (
    "false as written",
    "true and says nothing",
    "assumption does not hold",
    "needs a condition",
    "holds under less",
)


@dataclass(frozen=True)
class Finding:
    """A condition that a statement of the paper does not state.

    Attributes:
        statement: where it stands in the paper.
        finding: what is the case, in a sentence.
        example: the counterexample, in words.
        numbers: what was measured, by name.
        kind: one of `KINDS`.
    """

    statement: str
    finding: str
    example: str
    numbers: dict[str, float]
    kind: str


def findings() -> list[Finding]:
    """All of them, in the order of the paper."""
    return [
        infinite_start(),
        nothing_left_to_fit(),
        decay_without_learning(),
        released_recursion_untrained(),
        no_minimiser(),
        shrinking_family(),
        capacity_leaves_no_floor(),
        full_coupling_forgets(),
        annealed_coupling(),
        errors_need_not_be_summable(),
    ]


def infinite_start() -> Finding:
    """Lemma 1 and Theorem 3 need L(0) < infinity."""
    p, q = np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    frozen = statements.recurse(p, q, None, 0.5, 20)
    return Finding(
        "Lemma 1, eq. 13",
        "They need L(0) < infinity: q(0) must not be 0 where p(0) is not. Otherwise the bound is infinite (and 0 times "
        "infinity for alpha = 1), and the mixed supervisor keeps the forbidden mass for ever.",
        "p(0) = (1/2, 1/2), q = (1, 0) from a family that cannot move: L(t) is infinite at every t. A softmax with an "
        "excluded self column (k != i in eq. 4) has such zeros.",
        {"L(0)": frozen.losses[0], "L(20)": frozen.losses[20]},
        kind=EMPTY,
    )


def nothing_left_to_fit() -> Finding:
    """Under A1 and A2 the loss is 0 after one step, for every alpha."""
    draw = np.random.default_rng(0)
    p, q = draw.dirichlet(np.ones(16), 8), draw.dirichlet(np.ones(16), 8)
    alphas = (0.0, 0.01, 0.5, 1.0)
    traces = {alpha: statements.recurse(p, q, lambda p: p, alpha, 10) for alpha in alphas}
    return Finding(
        "Theorem 3; 6.2.4, point 1",
        "A1 and A2 together give L(1) = 0: the minimiser over a family that holds p(1) is p(1). The rate (1 - alpha)^t "
        "is true and empty; the static objective (alpha = 0) arrives as soon, alpha accelerates nothing, and p does "
        "not move after t = 1.",
        "n = 8 rows of 16 columns from Dirichlet(1), all distributions allowed: L(1) for alpha = 0, 0.01, 0.5, 1.",
        {
            "L(0)": traces[0.5].losses[0],
            **{f"L(1), alpha = {alpha:g}": trace.losses[1] for alpha, trace in traces.items()},
            "largest move of p after t = 1": max(trace.moved for trace in traces.values()),
        },
        kind=EMPTY,
    )


def decay_without_learning() -> Finding:
    """L(t) decays at the stated rate, and faster, when q never changes."""
    draw = np.random.default_rng(1)
    p, q = np.eye(16)[:8], draw.dirichlet(np.ones(16), 8)
    trace = statements.recurse(p, q, None, 0.5, 20)
    return Finding(
        "Theorem 3; eq. 13; 6.2.4, point 3",
        "The decay needs neither A1, nor A2, nor learning: it comes from moving the supervisor towards q. With q "
        "frozen L(t) falls at least as (1 - alpha)^t, in the end as (1 - alpha)^(2t). A falling L(t) is no evidence "
        "that anything was learned: what q says of p(0) is unchanged.",
        "p(0) one-hot, q random and never fitted, alpha = 1/2.",
        {
            "L(0)": trace.losses[0],
            "L(20)": trace.losses[20],
            "L(20) / L(19)": trace.losses[20] / trace.losses[19],
            "loss against p(0) at t = 20": trace.static[20],
        },
        kind=MORE,
    )


def released_recursion_untrained(batch: int = 64) -> Finding:
    """The released in-batch recursion refits nothing between its levels."""
    levels = [_at_uniform(t, batch) for t in (1, 2, 3)]
    steps = [levels[0], levels[1] - levels[0], levels[2] - levels[1]]
    return Finding(
        "Section 6.2 applied to the released code",
        "Inside a step the released recursion never fits q between levels, so A2 does not hold there; its levels "
        "decay by the previous point alone. The value of RKDO's loss for an encoder that knows nothing is lower than "
        "I-Con's for that reason, before any training.",
        f"Batch {batch}, uniform q (untrained encoder), depth 3, alpha = 1/2: KL of the three levels, their sum, and "
        "I-Con's value.",
        {
            **{f"KL of level {t}": value for t, value in enumerate(steps, start=1)},
            "RKDO at uniform": levels[2],
            "I-Con at uniform": Objective.icon().at_uniform(batch),
        },
        kind=UNMET,
    )


def _at_ideal(objective: Objective, batch: int) -> float:
    value = objective.at_ideal(batch)
    assert value is not None, "the cosine has a closed form"
    return value


def _at_uniform(depth: int, batch: int) -> float:
    return Objective.rkdo(depth=depth).at_uniform(batch)


def no_minimiser(batch: int = 64, temperature: float = 0.5) -> Finding:
    """A softmax holds no one-hot row: A1 fails at the paper's own start, and the minimum is not attained."""
    logits = np.array([1.0, 10.0, 30.0])
    open_softmax = [float(np.log1p(np.exp(-x))) for x in logits]
    return Finding(
        "A1, A2 with eq. 4",
        "The minimiser must exist. A softmax has no zeros, so it holds no one-hot p(0): the infimum 0 is not "
        "attained, and with unit-norm embeddings it is not even approached, because logits lie in [-1/tau, 1/tau].",
        f"p(0) = (1, 0): loss of softmax(x, 0) for x = 1, 10, 30; and the least loss of unit-norm embeddings for "
        f"p(0) = identity, batch {batch}, tau = {temperature:g} (the simplex).",
        {
            **{f"x = {x:g}": value for x, value in zip(logits, open_softmax, strict=True)},
            "unit norm, least": _at_ideal(Objective.infonce(temperature), batch),
        },
        kind=UNMET,
    )


def shrinking_family(before: float = 0.5, after: float = 0.45) -> Finding:
    """Lemma 2 needs q(t-1) in the family of step t, which a cooled temperature changes."""
    old, new = sign_fields(before), sign_fields(after)
    q = old[-1]  # the positive on the diagonal
    p = statements.supervisor(q, q, 0.5)  # = p(0) = q(0)
    fitted = min(statements.loss(p, member) for member in new)
    return Finding(
        "Lemma 2 and Theorem 3 with eq. 4's tau(t)",
        "Lemma 2 compares with q(t-1), which must lie in the family of step t. Cooling changes the family: at a lower "
        "temperature unit-norm embeddings may be unable to repeat the softer q(t-1), and the loss rises.",
        f"Two samples, embeddings +1 and -1 (d = 1), tau cooled from {before:g} to {after:g}, p(0) = q(0) = the "
        f"field of u = v = (1, -1): L(0) = 0, every field at the lower temperature is farther.",
        {"L(0)": statements.loss(q, q), "loss before the fit": statements.loss(p, q), "L(1)": fitted},
        kind=FALSE,
    )


def sign_fields(temperature: float) -> list[Field]:
    """Every learned field of two samples with embeddings in {-1, +1}: 2 x 2 each; the last has the diagonal high."""
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=4):
        similarity = np.outer(signs[:2], signs[2:])
        weights = np.exp(similarity / temperature)
        found.append(weights / weights.sum(axis=1, keepdims=True))
    return sorted(found, key=lambda q: float(np.trace(q)))


def capacity_leaves_no_floor() -> Finding:
    """With exact minimisation L(t) goes to 0 for every family; the floor L* of eq. 14 moves down with it."""
    p, q = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    trace = statements.recurse(p, q, lambda p: np.full_like(p, 0.5), 0.5, 20)
    return Finding(
        "Eq. 14 and its conclusion; 6.2.4, point 3",
        "L(t) does not go to a floor L* > 0. L* depends on t and equals L(t) under A2, so eq. 14 only says "
        "L(t) <= L(t-1); eq. 13 still holds, and L(t) -> 0 at the full rate, because p moves into the family. No "
        "plateau announces the capacity of the model. The loss that has a floor is that against p(0).",
        "A family of one field, the uniform one; p(0) = (0.9, 0.1), alpha = 1/2. The best loss against p(0) is 0.368.",
        {
            "L(0) = inf over the family": trace.losses[0],
            "L(20)": trace.losses[20],
            "against p(0), t = 20": trace.static[20],
        },
        kind=FALSE,
    )


def full_coupling_forgets() -> Finding:
    """alpha = 1 is allowed and gives the fastest rate by forgetting the supervision."""
    p, q = np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])
    trace = statements.recurse(p, q, lambda p: p, 1.0, 5)
    untrained = Objective.rkdo(depth=1, coupling=1.0, cooling=0.0)
    return Finding(
        "alpha in (0, 1], with alpha = 1",
        "alpha = 1 satisfies Theorem 3 with L(1) = 0 by p(1) = q(0): the supervision is dropped and q stays where it "
        "started. In the released recursion the loss is then 0 for every encoder, and so is its gradient.",
        "p(0) = (0.9, 0.1), q(0) = (0.2, 0.8), all distributions allowed; and RKDO with D = 1, alpha = 1, beta = 0.",
        {
            "L(1)": trace.losses[1],
            "against p(0), t = 0": trace.static[0],
            "against p(0), t = 5": trace.static[5],
            "in-batch loss at uniform": untrained.at_uniform(64),
            "in-batch loss at the ideal": _at_ideal(untrained, 64),
        },
        kind=EMPTY,
    )


def annealed_coupling(steps: int = 60) -> Finding:
    """With alpha_t the rate is the product of (1 - alpha_t), which need not go to 0."""
    p, q = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    for t in range(1, steps + 1):
        p = statements.supervisor(p, q, 2.0**-t)
    return Finding(
        "6.2.4, point 2 (annealed alpha)",
        "Theorem 3 is for a constant alpha. With alpha_t the bound is the product of (1 - alpha_t), which goes to 0 "
        "only if the alpha_t sum to infinity; an annealing that falls faster stops the decay.",
        "The one-field family of eq. 14's example with alpha_t = 2^-t, which sum to 1.",
        {
            "product of (1 - alpha_t)": math.prod(1 - 2.0**-t for t in range(1, steps + 1)),
            f"L({steps})": statements.loss(p, q),
        },
        kind=NEEDS,
    )


def errors_need_not_be_summable(steps: int = 120) -> Finding:
    """In eq. 15 it is enough that eps_t -> 0; a constant error leaves at most eps / alpha."""
    falling = statements.with_errors(lambda t: 0.1 / t, 0.5, steps)
    constant = statements.with_errors(lambda t: 0.05, 0.5, steps)
    return Finding(
        "Eq. 15 (sum of eps_t finite)",
        "The condition is sufficient and not necessary: L(t) -> 0 as soon as eps_t -> 0, since errors are forgotten "
        "at the rate (1 - alpha). A constant eps leaves L(t) below (1 - alpha)^t L(0) + eps / alpha. With alpha = 0 "
        "summability would not be enough.",
        f"p(0) = (0.9, 0.1), alpha = 1/2, errors met exactly: eps_t = 0.1 / t (not summable) and eps_t = 0.05, after "
        f"{steps} steps.",
        {"0.1 / t": falling[-1], "0.05": constant[-1], "0.05 / alpha": 0.1},
        kind=MORE,
    )
