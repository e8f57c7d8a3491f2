"""The report: what it says of runs with known differences, that nothing leaves the page, what a browser makes of it."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkdo_dist.evaluate import maps
from rkdo_dist.rundir import RunError
from rkdo_dist.studies.html import Element, tag
from rkdo_dist.studies.report import words
from rkdo_dist.studies.report.groups import last_common_epoch, read_groups
from rkdo_dist.studies.report.page import write_report
from tests.jobs import command
from tests.reports import fake_run, scores_of
from tests.test_damaged_files import AUDIT

SEEDS = (42, 123, 456, 789, 101)


def groups_of(*paths: Path):  # type: ignore[no-untyped-def]
    return read_groups(paths)[0]


def study(folder: Path, shift: float = 0.0, noise: float = 0.01) -> list[Path]:
    """Five seeds of RKDO and I-Con, whose accuracies differ by `shift` beyond noise."""
    draw = np.random.default_rng(0)
    paths = []
    for objective, losses, extra in (("rkdo", [1.95, 1.60], shift), ("icon", [2.68, 2.32], 0.0)):
        for seed in SEEDS:
            jitter = noise * draw.normal(size=4)
            judged = {
                4: scores_of(0.20 + extra + jitter[0], 5.3 + jitter[1]),
                8: scores_of(0.26 + extra + jitter[2], 5.0 + jitter[3]),
            }
            paths.append(fake_run(folder / f"{objective}-{seed}", objective, seed, losses, judged))
    return paths


# --- what is said ---------------------------------------------------------------------------------------------


def test_the_gap_is_taken_apart(tmp_path: Path) -> None:
    first, second = groups_of(*study(tmp_path))
    text = " ".join(words.loss_gap(first, second))
    assert "the mean loss of RKDO is 1.6000 and that of I-Con 2.3200: RKDO is 31.0% lower" in text
    assert "An untrained encoder scores 2.1396 and 2.8472: 24.9% lower before any training" in text
    assert "0.7075 of the gap of 0.7200 (98%) existed before training; training added the other 0.0125" in text
    assert "RKDO has attained 38.9% and I-Con 34.4%" in text
    assert " ".join(words.loss_gap(second, first)) == text, "the order of the runs does not matter"


def test_a_gap_that_training_has_made_and_one_that_it_has_narrowed(tmp_path: Path) -> None:
    one = groups_of(fake_run(tmp_path / "a", "icon", 1, [1.5]), fake_run(tmp_path / "b", "rkdo", 1, [2.0]))
    assert "training made the whole gap of 0.5000" in " ".join(words.loss_gap(*one))
    two = groups_of(fake_run(tmp_path / "c", "icon", 1, [1.9]), fake_run(tmp_path / "d", "rkdo", 1, [1.8]))
    assert "the gap before training was larger (0.7075) than the 0.1000 now" in " ".join(words.loss_gap(*two))
    same = groups_of(
        fake_run(tmp_path / "e", "rkdo", 1, [1.9]),
        fake_run(tmp_path / "f", "rkdo", 1, [1.8], None, "train.learning_rate=0.1"),
    )
    assert [group.label for group in same] == ["RKDO (learning_rate 0.001)", "RKDO (learning_rate 0.1)"]
    assert "the same value for an untrained encoder" in " ".join(words.loss_gap(*same))


def test_noise_is_no_evidence_and_a_real_difference_is(tmp_path: Path) -> None:
    first, second = groups_of(*study(tmp_path / "noise"))
    found = words.comparisons([first, second])
    assert {one.name for one in found} == {"linear_accuracy", "infonce"}
    assert all(one.step == 8 and one.result.n == 5 for one in found)
    text = " ".join(words.evidence(first, second, found))
    assert "There is no evidence of a difference in any of them" in text
    first, second = groups_of(*study(tmp_path / "real", shift=0.1))
    text = " ".join(words.evidence(first, second, words.comparisons([first, second])))
    assert "linear accuracy (embedding): RKDO higher by 0.1" in text
    assert "There is no evidence of a difference in the others: InfoNCE" in text


def test_what_supervisors_could_transfer_and_what_a_study_could_see(tmp_path: Path) -> None:
    rows = ["field.recursion=persistent", "train.epochs=12", "train.batches_per_epoch=null"]
    runs = [fake_run(tmp_path / f"p{s}", "rkdo", s, [2.0], {4: scores_of(0.3 + 0.01 * s)}, *rows) for s in (1, 2, 3)]
    runs += [fake_run(tmp_path / f"i{s}", "icon", s, [2.0], {4: scores_of(0.3 + 0.02 * s)}) for s in (1, 2, 3)]
    (runs[0] / "audit.json").write_text(
        json.dumps({**AUDIT, "best": {**AUDIT["best"], "precision": 0.4}, "student": 0.15})
    )
    persistent, icon = groups_of(*runs)
    said = " ".join(words.supervisors(persistent))
    assert "dilution: a batch of 64 out of 256 samples keeps 24.71%" in said
    assert "forgetting: field.coupling=0.5 leaves 0.00024" in said
    assert "precision gap +0.250" in said
    assert words.supervisors(icon) == []
    (found,) = [c for c in words.comparisons([persistent, icon]) if c.name == "linear_accuracy"]
    assert found.result.detectable == pytest.approx(3.26 * 0.01, rel=0.01)
    assert "a difference of 0.0326 in linear accuracy" in " ".join(words.evidence(persistent, icon, [found]))


def test_equal_differences_of_a_few_seeds_are_no_certainty(tmp_path: Path) -> None:
    """Accuracies are multiples of 1/n: the same difference twice has no spread, which is no certainty."""
    paths = [
        fake_run(tmp_path / f"{objective}-{seed}", objective, seed, [2.0], {4: scores_of(0.1 * seed + extra)})
        for objective, extra in (("rkdo", 2 / 141), ("icon", 0.0))
        for seed in (1, 2)
    ]
    one = groups_of(*paths)
    (accuracy, _) = words.comparisons(one)
    assert not accuracy.evident
    assert "There is no evidence of a difference in any of them" in " ".join(words.evidence(*one, [accuracy]))


def test_one_seed_and_no_common_seed_and_no_common_step_are_said(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", "rkdo", 1, [1.9, 1.7], {4: scores_of(0.2), 8: scores_of(0.3)})
    b = fake_run(tmp_path / "b", "icon", 1, [2.7], {4: scores_of(0.1)})
    c = fake_run(tmp_path / "c", "infonce", 2, [4.0], {4: scores_of(0.1)})
    d = fake_run(tmp_path / "d", "infonce", 1, [4.0], {3: scores_of(0.1)})
    one = groups_of(a, b)
    found = words.comparisons(one)
    assert found[0].step == 4, "the last step that both have"
    assert not any(f.evident for f in found)
    assert "nothing can be tested" in " ".join(words.evidence(*one, found))
    assert "no seed in common" in " ".join(words.evidence(*groups_of(a, c), words.comparisons(groups_of(a, c))))
    assert "no evaluation at the same step" in " ".join(words.evidence(*groups_of(a, d), []))
    assert last_common_epoch(one) == 0


def test_runs_of_one_configuration_form_a_group_and_twins_are_left_out(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / str(n), "rkdo", seed, [1.9]) for n, seed in enumerate((7, 3, 7))]
    groups, remarks = read_groups(paths)
    assert [[run.seed for run in group.runs] for group in groups] == [[3, 7]]
    assert len(remarks) == 1
    assert "same configuration and seed" in remarks[0]


# --- the page ---------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def require_self_contained(text: str) -> Page:
    page = Page(text)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for name, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "action")], name
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    return page


def test_text_is_escaped_and_elements_are_not() -> None:
    made = tag("p", "<b>&\"'", tag("i", 3.5), None, class_='x"><script>')
    assert made == '<p class="x&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;&quot;&#x27;<i>3.5</i></p>'
    assert isinstance(made, Element)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    path = fake_run(
        tmp_path / "<img src=x onerror=alert(1)>", "rkdo", 1, [1.9], {4: scores_of(0.2)}, f"data.shards='{attack}'"
    )
    facts = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps({**facts, "platform": attack, "commit": "&lt;" + attack}))
    write_report([path], tmp_path / "out" / "page.html")
    page = require_self_contained((tmp_path / "out" / "page.html").read_text())
    assert page.text.count(attack) >= 2


def test_a_study_without_its_shards(tmp_path: Path) -> None:
    """Tables, curves and tests are there; the pictures say why they are not."""
    write_report(study(tmp_path), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = require_self_contained(text)
    for sentence in (
        "RKDO against I-Con",
        "10 runs on cifar10, resnet18, seeds 42, 101, 123, 456, 789",
        "24.9% lower before any training",
        "There is no evidence of a difference in any of them",
        "No pictures: they need the newest checkpoint and the shards",
        "p (Holm)",
        "cross-entropy, summed over levels",
        "settings that are the same for all",
    ):
        assert sentence in page.text, sentence
    assert len([1 for name, _ in page.tags if name == "img"]) == 2 + 2 + 3 + 3, (
        "panels, each with a file of its own, and legends"
    )
    assert re.search(r"0\.2\d+[^s]*8 steps, 4 s", page.text), (
        "resources without FLOPs, as the images' size is not known"
    )
    again = tmp_path / "again.html"
    write_report(study(tmp_path / "again"), again)
    assert len(again.read_text()) == pytest.approx(len(text), rel=0.01)


def test_the_page_is_for_narrow_screens_dark_rooms_and_paper(tmp_path: Path) -> None:
    """No table or figure that only a wide screen has room for; nothing folded on paper (the nightly test looks)."""
    write_report(study(tmp_path), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for table in re.findall(r"<table.*?</table>", text):
        columns = table.count('<th scope="col"')
        assert (columns > 3) == ("many" in table.split(">")[0]), "a list of its rows on a narrow screen"
        assert all("data-label=" in cell for cell in re.findall(r"<td[^>]*>", table))
    widths = [float(width) for svg in svgs(text) for width in re.findall(r'<svg[^>]*? width="([\d.]+)pt"', svg)]
    assert len(widths) == 10
    assert max(widths) < 330, "a panel of 440 pixels at most: letters of 8 points have 9 pixels where there are 370"
    style = text.split("<style>")[1].split("</style>")[0]
    for rule in (
        "@media (prefers-color-scheme: dark)",
        "@media print",
        "@media (max-width: 44rem)",
        "break-after: avoid",
        "details::details-content { content-visibility: visible",
    ):
        assert rule in style, rule


def svgs(text: str) -> list[str]:
    """The drawings of a page."""
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "begun", "rkdo", 1, [])
    code, text = command(["report", str(path)])
    assert code == 0, text
    page = require_self_contained((path / "report.html").read_text())
    assert "Without a step or an evaluation so far" in page.text
    other = fake_run(tmp_path / "other", "icon", 1, [2.7], {4: scores_of(0.1)})
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')  # being written right now
    write_report([path, other], tmp_path / "page.html")
    assert "have no epoch in common yet" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "page.html")
    code, text = command(["report", str(tmp_path)])
    assert code == 2
    assert "is not a run directory" in text


# --- maps -------------------------------------------------------------------------------------------------------


def test_the_map_is_the_plane_of_largest_variance() -> None:
    draw = np.random.default_rng(0)
    plane = draw.normal(size=(200, 2)) * [5.0, 2.0]
    turn = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    features = np.concatenate([plane, 0.01 * draw.normal(size=(200, 4))], axis=1) @ turn + 3
    found, shares = maps.principal_components(features)
    centred = plane - plane.mean(axis=0)
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert shares[0] > shares[1]
    distances = [np.linalg.norm(x[:, None] - x[None], axis=2) for x in (found, centred)]
    assert np.allclose(*distances, atol=0.2)
    assert maps.principal_components(np.ones((4, 3)))[1] == (0.0, 0.0)


def test_tsne_separates_what_is_far_apart_and_repeats_itself() -> None:
    draw = np.random.default_rng(0)
    features = np.concatenate([draw.normal(size=(30, 8)), draw.normal(size=(30, 8)) + 20])
    found = maps.tsne(features)
    assert found.shape == (60, 2)
    assert np.array_equal(found, maps.tsne(features))
    centres = found[:30].mean(0), found[30:].mean(0)
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * found[:30].std()
    with pytest.raises(ValueError, match="at least 8"):
        maps.tsne(features[:5])


@pytest.fixture
def page(reference: Path, tmp_path: Path) -> Path:
    """The page of a real run and a made-up one."""
    other = fake_run(tmp_path / "other", "icon", 42, [2.7], {4: scores_of(0.1)})
    code, text = command(["report", str(reference), str(other), "--out", str(tmp_path / "page.html")])
    assert code == 0, text
    return tmp_path / "page.html"


def require_everything(text: str) -> None:
    """All sections and pictures of `page`, and nothing from elsewhere."""
    found = require_self_contained(text)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    for title in ("What the loss gap consists of", "Scores", "Curves", "Resources", "Pictures: RKDO", "Settings"):
        assert title in titles
    pictures = [a["src"] or "" for name, a in found.tags if name == "img"]
    assert sum(src.startswith("data:image/svg+xml") for src in pictures) >= 4, "curves, resources and the embedding map"
    assert sum(src.startswith("data:image/png") for src in pictures) >= 8 * 7, "neighbours and the field"
    assert "Field heat maps" in text


def test_a_real_run_is_shown_whole_and_asks_for_nothing(page: Path) -> None:
    require_everything(page.read_text())


# --- in a browser -----------------------------------------------------------------------------------------------


def browser() -> str:
    """A Chromium; without one the test is skipped, but not in CI."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium here, and CI is set: apt-get install chromium")
        pytest.skip("no Chromium here")
    return found


def open_page(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    return subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser's own errands end here
         f"--user-data-dir={folder}", f"--log-net-log={folder / 'net.json'}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def requested(log: Path) -> set[str]:
    """Addresses outside files and the page itself that the page asked for; the browser's own errands have no origin."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r'"initiator":"([^"]*)"[^\n]*?"url":"([^"]+)"', text)
    return {url for origin, url in found if origin != "not an origin" and not url.startswith(("file:", "data:"))}


@pytest.mark.nightly
def test_a_browser_shows_a_real_run_and_asks_for_nothing(page: Path, tmp_path: Path) -> None:
    shown = open_page(page, tmp_path / "dom", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert not requested(tmp_path / "dom" / "net.json")
    require_everything(shown.stdout)
    open_page(
        page, tmp_path / "shot", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1100,1400", "--hide-scrollbars"
    )
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert picture.shape == (1400, 1100)
    assert 0.002 < np.mean(picture < 128) < 0.3, "text on white paper, neither empty nor black"


@pytest.mark.nightly
def test_a_narrow_dark_screen_and_paper_show_everything(page: Path, tmp_path: Path) -> None:
    """500 pixels (less than any browser's window here): the right margin is empty; dark; every setting is on paper."""
    shot = f"--screenshot={tmp_path / 'narrow.png'}"
    dark = "--blink-settings=preferredColorScheme=0"
    open_page(page, tmp_path / "narrow", shot, "--window-size=500,9000", "--hide-scrollbars", dark)
    picture = np.asarray(Image.open(tmp_path / "narrow.png").convert("L")).astype(int)
    assert picture.shape == (9000, 500)
    assert np.ptp(picture[:, -8:]) < 8, "nothing leaves the page on its right"
    assert picture[:, -8:].max() < 60, "dark"
    open_page(page, tmp_path / "print", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    folded = page.with_name("folded.html")
    folded.write_text(page.read_text().replace("details::details-content", "details::nothing"))
    open_page(folded, tmp_path / "again", f"--print-to-pdf={tmp_path / 'folded.pdf'}", "--no-pdf-header-footer")
    pages = [(tmp_path / name).read_bytes().count(b"/Type /Page\n") for name in ("page.pdf", "folded.pdf")]
    assert pages[0] > pages[1] > 0, "the folded settings are printed"


@pytest.mark.nightly
def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    """The controls: a page that asks for something, and one that complains."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>console.error('trouble')</script>")
    shown = open_page(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" in shown.stderr
    assert requested(tmp_path / "profile" / "net.json")
    with pytest.raises(AssertionError):
        require_self_contained(shown.stdout + "<style></style>")
