"""The numbers of the paper (Martin 2025), transcribed from its tables: mean and standard deviation over five seeds.

Standard deviations are those of the population (divided by five, not by four), as in the notebooks. Table 1 is section
5.1.1, Tables 2 and 3 section 5.2, Table 4 appendix A.1; Figures 1 to 5 show the numbers of Tables 1
and 2. Percentages are as printed; the paper computes them from unrounded means.
"""

from __future__ import annotations

from dataclasses import dataclass

DATASETS = ("cifar10", "cifar100", "stl10")
EPOCHS = (1, 2, 5, 10)
SEEDS = (42, 123, 456, 789, 101)
METRICS = {"linear_accuracy": "Linear Eval", "nmi": "NMI", "ari": "ARI", "neighbourhood": "Neighborhood Acc"}

Number = tuple[float, float]  # mean, standard deviation
Pair = tuple[Number, Number]  # RKDO's, I-Con's


@dataclass(frozen=True)
class Row:
    """A row of a table: RKDO, I-Con, and the percentage of the last column as printed."""

    rkdo: Number
    icon: Number
    percent: float


@dataclass(frozen=True)
class EarlyRow:
    """A row of Table 3: RKDO after few epochs beside I-Con after more, and the savings that the paper reads from it."""

    rkdo_epochs: int
    rkdo: Number
    icon_epochs: int
    icon: Number
    savings: str


# Final loss; the percentage is how much lower RKDO's is.
TABLE_1 = {
    ("cifar10", 1): Row((1.9384, 0.0403), (2.6768, 0.0369), 27.59),
    ("cifar10", 2): Row((1.7897, 0.0445), (2.5176, 0.0291), 28.91),
    ("cifar10", 5): Row((1.6584, 0.0335), (2.4000, 0.0321), 30.90),
    ("cifar10", 10): Row((1.6200, 0.0233), (2.3127, 0.0184), 29.95),
    ("cifar100", 1): Row((1.9245, 0.0205), (2.6338, 0.0251), 26.93),
    ("cifar100", 2): Row((1.7829, 0.0269), (2.5089, 0.0337), 28.94),
    ("cifar100", 5): Row((1.6567, 0.0290), (2.3648, 0.0301), 29.94),
    ("cifar100", 10): Row((1.5720, 0.0133), (2.2857, 0.0184), 31.23),
    ("stl10", 1): Row((1.5422, 0.0310), (2.2353, 0.0329), 31.01),
    ("stl10", 2): Row((1.4390, 0.0483), (2.1297, 0.0451), 32.43),
    ("stl10", 5): Row((1.3331, 0.0742), (2.0312, 0.0473), 34.37),
    ("stl10", 10): Row((1.3249, 0.0460), (1.9777, 0.0344), 33.01),
}

# Linear evaluation accuracy; the percentage is RKDO over I-Con.
TABLE_2 = {
    ("cifar10", 1): Row((0.2496, 0.0384), (0.2454, 0.0300), 1.73),
    ("cifar10", 2): Row((0.2667, 0.0208), (0.2723, 0.0139), -2.08),
    ("cifar10", 5): Row((0.3078, 0.0374), (0.3291, 0.0208), -6.47),
    ("cifar10", 10): Row((0.2894, 0.0299), (0.3206, 0.0192), -9.73),
    ("cifar100", 1): Row((0.0170, 0.0057), (0.0213, 0.0045), -20.00),
    ("cifar100", 2): Row((0.0255, 0.0115), (0.0170, 0.0035), 50.00),
    ("cifar100", 5): Row((0.0255, 0.0072), (0.0227, 0.0053), 12.50),
    ("cifar100", 10): Row((0.0227, 0.0113), (0.0199, 0.0053), 14.29),
    ("stl10", 1): Row((0.1803, 0.0422), (0.1831, 0.0445), -1.54),
    ("stl10", 2): Row((0.2225, 0.0350), (0.1775, 0.0352), 25.40),
    ("stl10", 5): Row((0.2141, 0.0559), (0.2197, 0.0414), -2.56),
    ("stl10", 10): Row((0.2113, 0.0367), (0.2479, 0.0363), -14.77),
}

# Linear evaluation accuracy, early RKDO against later I-Con.
TABLE_3 = {
    "cifar10": EarlyRow(1, (0.2496, 0.0384), 5, (0.3291, 0.0208), "80% fewer resources"),
    "cifar100": EarlyRow(2, (0.0255, 0.0115), 5, (0.0227, 0.0053), "Superior performance with 60% fewer resources"),
    "stl10": EarlyRow(2, (0.2225, 0.0350), 5, (0.2197, 0.0414), "Similar performance with 60% fewer resources"),
}

# Four scores at two epochs.
TABLE_4_EPOCHS = 2
TABLE_4 = {
    ("cifar10", "linear_accuracy"): Row((0.2667, 0.0208), (0.2723, 0.0139), -2.08),
    ("cifar10", "nmi"): Row((0.1211, 0.0186), (0.1255, 0.0179), -3.48),
    ("cifar10", "ari"): Row((0.0533, 0.0103), (0.0550, 0.0102), -3.10),
    ("cifar10", "neighbourhood"): Row((0.1798, 0.0085), (0.1806, 0.0125), -0.44),
    ("cifar100", "linear_accuracy"): Row((0.0255, 0.0115), (0.0170, 0.0035), 50.00),
    ("cifar100", "nmi"): Row((0.5703, 0.0038), (0.5678, 0.0075), 0.43),
    ("cifar100", "ari"): Row((0.0152, 0.0036), (0.0161, 0.0027), -5.15),
    ("cifar100", "neighbourhood"): Row((0.0263, 0.0007), (0.0278, 0.0023), -5.51),
    ("stl10", "linear_accuracy"): Row((0.2225, 0.0350), (0.1775, 0.0352), 25.40),
    ("stl10", "nmi"): Row((0.1715, 0.0223), (0.1749, 0.0164), -1.97),
    ("stl10", "ari"): Row((0.0702, 0.0140), (0.0670, 0.0103), 4.80),
    ("stl10", "neighbourhood"): Row((0.1690, 0.0131), (0.1744, 0.0210), -3.13),
}

# The author's second run, with the same seeds (the notebook of 2025-05-08; the tables above are that of 2025-04-30).
# Linear evaluation by seed, in the order of SEEDS: images that were classified rightly, of SCORED; RKDO and I-Con in
# the first run, then in the second. No pair has p < 0.05 (paired t-test), so Table 2 is evidence of no difference.
SCORED = {"cifar10": 141, "cifar100": 141, "stl10": 71}
CORRECT = {
    ("cifar10", 1): (((36, 36, 41, 38, 25), (39, 33, 40, 32, 29)), ((36, 39, 41, 37, 27), (45, 35, 37, 39, 31))),
    ("cifar10", 2): (((38, 37, 35, 43, 35), (41, 38, 39, 39, 35)), ((45, 37, 40, 37, 38), (34, 43, 41, 40, 33))),
    ("cifar10", 5): (((46, 43, 34, 50, 44), (44, 46, 46, 44, 52)), ((43, 36, 40, 43, 50), (46, 42, 39, 40, 50))),
    ("cifar10", 10): (((44, 35, 39, 47, 39), (46, 50, 44, 42, 44)), ((48, 47, 44, 42, 42), (44, 45, 49, 47, 48))),
    ("cifar100", 1): (((3, 3, 1, 3, 2), (4, 3, 3, 3, 2)), ((3, 3, 2, 4, 2), (2, 3, 2, 3, 2))),
    ("cifar100", 2): (((2, 5, 6, 2, 3), (3, 2, 2, 3, 2)), ((2, 3, 3, 6, 3), (2, 3, 7, 2, 4))),
    ("cifar100", 5): (((3, 4, 5, 2, 4), (4, 4, 3, 2, 3)), ((3, 3, 5, 4, 4), (2, 5, 5, 4, 2))),
    ("cifar100", 10): (((2, 4, 2, 2, 6), (2, 2, 3, 3, 4)), ((5, 3, 4, 4, 3), (2, 3, 4, 1, 1))),
    ("stl10", 1): (((9, 17, 13, 10, 15), (10, 19, 12, 13, 11)), ((13, 9, 11, 9, 9), (11, 19, 12, 12, 16))),
    ("stl10", 2): (((15, 18, 15, 12, 19), (8, 15, 12, 14, 14)), ((8, 13, 16, 9, 12), (12, 9, 12, 10, 15))),
    ("stl10", 5): (((13, 15, 10, 22, 16), (19, 15, 13, 12, 19)), ((13, 12, 12, 17, 17), (9, 15, 14, 14, 16))),
    ("stl10", 10): (((11, 19, 15, 14, 16), (16, 20, 17, 14, 21)), ((17, 17, 16, 22, 21), (15, 19, 20, 20, 21))),
}
# Its final losses, and its other scores at two epochs: RKDO, I-Con.
SECOND_LOSSES: dict[tuple[str, int], Pair] = {
    ("cifar10", 1): ((1.9418, 0.0388), (2.6581, 0.0290)),
    ("cifar10", 2): ((1.7845, 0.0144), (2.5200, 0.0324)),
    ("cifar10", 5): ((1.6786, 0.0189), (2.3925, 0.0270)),
    ("cifar10", 10): ((1.5974, 0.0211), (2.3112, 0.0292)),
    ("cifar100", 1): ((1.9238, 0.0229), (2.6386, 0.0166)),
    ("cifar100", 2): ((1.7756, 0.0191), (2.5245, 0.0296)),
    ("cifar100", 5): ((1.6448, 0.0277), (2.3821, 0.0148)),
    ("cifar100", 10): ((1.5797, 0.0144), (2.2878, 0.0086)),
    ("stl10", 1): ((1.5473, 0.0283), (2.2359, 0.0267)),
    ("stl10", 2): ((1.4689, 0.0524), (2.1617, 0.0429)),
    ("stl10", 5): ((1.3321, 0.0725), (2.0215, 0.0251)),
    ("stl10", 10): ((1.2745, 0.0304), (1.9458, 0.0715)),
}
SECOND_SCORES: dict[tuple[str, str], Pair] = {
    ("cifar10", "nmi"): ((0.1249, 0.0116), (0.1308, 0.0180)),
    ("cifar10", "ari"): ((0.0549, 0.0057), (0.0600, 0.0157)),
    ("cifar10", "neighbourhood"): ((0.1799, 0.0103), (0.1887, 0.0061)),
    ("cifar100", "nmi"): ((0.5648, 0.0083), (0.5640, 0.0125)),
    ("cifar100", "ari"): ((0.0129, 0.0013), (0.0147, 0.0028)),
    ("cifar100", "neighbourhood"): ((0.0257, 0.0026), (0.0256, 0.0022)),
    ("stl10", "nmi"): ((0.1681, 0.0350), (0.1562, 0.0141)),
    ("stl10", "ari"): ((0.0584, 0.0246), (0.0604, 0.0140)),
    ("stl10", "neighbourhood"): ((0.1725, 0.0069), (0.1692, 0.0107)),
}


def accuracies(dataset: str, epochs: int, run: int) -> tuple[list[float], list[float]]:
    """Linear evaluation accuracy by seed of the author's first (0) or second (1) run: RKDO's, I-Con's."""
    rkdo, icon = ([count / SCORED[dataset] for count in counts] for counts in CORRECT[dataset, epochs][run])
    return rkdo, icon
