"""Every setting with values that no one would choose: refused in one line that names it, or accepted; never a crash."""

from __future__ import annotations

import dataclasses

import pytest

from rkdo_dist import config as c
from rkdo_dist import parts

VALUES = [
    ".nan", ".inf", "0", "-1", "1e400", "1" + "0" * 400, "1" + "0" * 5000, "1e-45", "1e300", "''", "[]", "{a: 1}",
    "[[1]]", "null", "true", "text", "9223372036854775808", "1099511627776", "[1, 2, 3, 4, 5]", '"\\0"', '"\\ud800"',
    "2001-99-99", "x" * 300, "12:30:45", "1:30.5", "010",
]  # fmt: skip


@pytest.mark.parametrize("key", c.flatten(c.Config()))
def test_a_value_is_refused_in_one_line_with_its_key_or_accepted(key: str) -> None:
    for value in VALUES:
        try:
            parts.check(c.change(c.Config(), [f"{key}={value}"]))
        except c.ConfigError as error:
            text = str(error)
            assert key in text, value
            assert "\n" not in text, value
            assert len(text) < 600, value


def refusal(override: str) -> str:
    """Why it is refused; empty if it is not."""
    try:
        c.change(c.Config(), [override])
    except c.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", ["12:30:45", "1:30", "010", "-017", "!!int 12:30:45"])
def test_numbers_that_yaml_reads_in_another_base_are_text(value: str) -> None:
    assert "train.epochs must be a whole number" in refusal(f"train.epochs={value}")
    assert "train.learning_rate must be a number" in refusal("train.learning_rate=1:30.5")


def test_the_ends_of_every_range_are_in_it_and_what_is_beyond_is_not() -> None:
    tested = 0
    for section in dataclasses.fields(c.Config()):
        for item in dataclasses.fields(getattr(c.Config(), section.name)):
            key, bounds = f"{section.name}.{item.name}", item.metadata
            whole, listed = "int" in str(item.type), "tuple[int, ...]" in str(item.type)
            for bound, sign in (("least", -1), ("above", -1), ("most", 1)):
                end = bounds[bound]
                if end is None:
                    continue
                beyond = end if bound == "above" else end + sign * (1 if whole else abs(end) * 1e-6 + 1e-12)
                assert f"{key} must be" in refusal(f"{key}={[beyond] if listed else beyond}")
                if bound != "above":  # a rule between settings may refuse the end, but not for its range
                    assert f"{key} must be {bounds['within']}" not in refusal(f"{key}={[end] if listed else end}")
                tested += 1
    assert tested > 50
