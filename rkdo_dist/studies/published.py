"""The numbers of the paper (Martin 2025), transcribed from its tables: mean and standard deviation over five seeds.

Table 1 is section 5.1.1, Tables 2 and 3 section 5.2, Table 4 appendix A.1; Figures 1 to 5 show the numbers of Tables 1
and 2. Percentages are as printed; the paper computes them from unrounded means.
"""

from __future__ import annotations

from dataclasses import dataclass

DATASETS = ("cifar10", "cifar100", "stl10")
EPOCHS = (1, 2, 5, 10)
SEEDS = (42, 123, 456, 789, 101)
METRICS = {"linear_accuracy": "Linear Eval", "nmi": "NMI", "ari": "ARI", "neighbourhood": "Neighborhood Acc"}

Number = tuple[float, float]  # mean, standard deviation


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
