"""The report: what it shows, what it leaves out, and that it is one file that loads nothing."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import resfast
from resfast.cli.report import main
from resfast.config.files import load as load_config
from resfast.config.files import to_json
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from resfast.reporting.collect import collect, groups_of, short_names
from resfast.reporting.figures import coloured, dash_number, seconds_of
from resfast.reporting.page import report
from resfast.reporting.pictures import side_by_side
from resfast.reporting.tables import networks, shown
from resfast.runs.epoch_row import read_rows
from resfast.runs.summary import read_run
from resfast.training.seeds import train
from tests.conftest import change
from tests.test_run_folders import options

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "br", "line", "path", "use", "rect", "link", "input", "hr"}


class Page(HTMLParser):
    """The parts of a page that tests look at; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.styles = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"] or "")
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset"):
            if (value := values.get(name)) is not None:
                self.links.append(value) if value.startswith("#") else self.loaded.append(value)
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def three(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("report")
    config = change(options(image_tree, folder), runs=3, name="three", epochs=2, lr=0.01)
    return train(config).path


@pytest.fixture(scope="module")
def page_of_three(three: Path) -> Path:
    """The page of the three runs."""
    path = three.parent / "page.html"
    assert main([str(three), "-o", str(path), "--device", "cpu"]) == 0
    return path


@pytest.fixture
def study(three: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder of runs with other configurations, by copying one."""

    def make(count: int) -> Path:
        for number in range(count):
            run = tmp_path / "study" / f"net-{number}"
            shutil.copytree(three / "seed0", run)
            config = load_config(run / "config.json")
            (run / "config.json").write_text(to_json(change(config, lr=0.01 * (number + 1))))
        return tmp_path / "study"

    return make


def written(arguments: list[str], path: Path) -> Page:
    assert main([*arguments, "-o", str(path), "--device", "cpu"]) == 0
    return Page(path.read_text(encoding="utf-8"))


def checked(page: Page) -> Page:
    """The page, which loads nothing and is well-formed."""
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert not re.search(r"url\((?!#)|@import", page.styles)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(image["alt"] for image in page.images)
    assert "script" not in page.tags
    assert "link" not in page.tags
    return page


def test_the_page_of_one_run_has_every_section(three: Path, tmp_path: Path) -> None:
    page = checked(written([str(three / "seed0")], tmp_path / "page.html"))
    summary = read_run(three / "seed0" / "summary.json")
    for text in (
        f"{summary.params:,}",
        f"{summary.macs:,}",
        f"{100 * summary.test_accuracy:.2f} %",
        f"{100 * summary.tta_accuracy:.2f} %",
        f"{summary.images_per_second:,.0f}",
        "Options of seed0 that are not the program's defaults",
        "--batch-size",
        "stages.1.0.conv2",
        "48 training images (held-out ones included) and 16 test images in 2 classes",
        "seed0: 16 test images",
    ):
        assert text in page.text, text
    assert page.tags.count("section") == 9
    assert page.tags.count("caption") == page.tags.count("table")
    assert "left out" not in page.text.lower()


def test_the_images_are_those_of_the_data(three: Path, tmp_path: Path) -> None:
    page = written([str(three / "seed0"), "--images-per-class", "3"], tmp_path / "page.html")
    data = load_data(three / "seed0")
    rows = [image for image in page.images if image["alt"].startswith("Training images of")]
    assert [row["alt"] for row in rows] == ["Training images of left", "Training images of right"]
    indices = (data.train_labels == 0).nonzero()[:, 0]
    expected = side_by_side(data.train_images[indices[torch.arange(3) * len(indices) // 3]])
    assert torch.equal(pixels(rows[0]), expected)


def load_data(run: Path):
    config = load_config(run / "config.json").data
    return load_dataset(config.data, data_dir=config.data_dir, image_size=config.image_size)


def pixels(image: dict[str, str | None]) -> torch.Tensor:
    encoded = (image["src"] or "").partition(",")[2]
    opened = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    return torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).reshape(
        opened.height, opened.width, 3
    )


def test_the_mistakes_are_the_most_confident_ones(three: Path, tmp_path: Path) -> None:
    run = three / "seed0"
    page = written([str(run), "--mistakes", "2"], tmp_path / "page.html")
    data, trained = load_data(run), resfast.load(run, device="cpu")
    found, predicted = trained.probabilities(data.test_images).max(1)
    wrong = (predicted != data.test_labels).nonzero()[:, 0].tolist()
    assert wrong, "the network of this test must be wrong somewhere"
    wrong.sort(key=lambda index: -float(found[index]))
    assert f"classifies {len(wrong)} of 16 test images wrongly" in page.text
    images = [image for image in page.images if image["alt"].startswith("Image of")]
    assert len(images) == min(2, len(wrong))
    for image, index in zip(images, wrong, strict=False):
        true, guess = (trained.classes[int(v[index])] for v in (data.test_labels, predicted))
        assert image["alt"] == f"Image of {true}, classified as {guess}"
        assert torch.equal(pixels(image), data.test_images[index])


def test_mistakes_of_a_run_without_test_images_are_among_the_held_out_ones(
    image_tree: Path, tmp_path: Path
) -> None:
    config = change(options(image_tree, tmp_path), name="held", lr=0.01, val_fraction=0.25)
    run = train(change(config, score_test=False, max_images=32)).path
    page = checked(written([str(run)], tmp_path / "page.html"))
    assert re.search(r"of 8 held-out images|all 8 held-out images", page.text)
    assert "of the held-out images" in page.text
    assert "held: 8 held-out images" in page.text
    assert "Runs use only 32 of the training images (--max-images)" in page.text
    assert not re.search(r"[0-9] test images wrongly|all \d+ test images", page.text)


def test_seeds_are_one_group_with_their_mean(three: Path, page_of_three: Path) -> None:
    page = checked(Page(page_of_three.read_text(encoding="utf-8")))
    summaries = [read_run(three / f"seed{n}" / "summary.json") for n in range(3)]
    mean = sum(one.tta_accuracy for one in summaries) / 3
    assert "Runs that differ in their seed" in page.text
    assert f"{100 * mean:.2f} %" in page.text
    assert "three (3 runs): 48 test images, sum of 3 runs" in page.text
    (group,) = groups_of(collect([three]))
    total = sum(torch.tensor(one.confusion) for one in summaries)
    assert torch.equal(group.confusion(), total)
    assert [number for _, number in coloured([group])] == [0, 1, 2]


def test_ten_networks_have_ten_colours_and_a_table_of_differences(
    study: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = [str(study(10)), "--mistakes", "0", "--images-per-class", "0"]
    page = checked(written(arguments, tmp_path / "page.html"))
    assert "Left out, as --mistakes is 0" in page.text
    assert "10 runs" in page.text
    assert "Options that differ between the runs and affect the result" in page.text
    assert all(f"net-{number}" in page.text for number in range(10))
    groups = groups_of(collect([tmp_path / "study"]))
    assert len(groups) == 10
    styles = {(group.number % 10, dash_number(group.number)) for group in groups}
    assert len(styles) == 10
    assert len(networks(groups)) == 1  # the same network has one table


def test_styles_of_lines_do_not_repeat_in_forty_groups() -> None:
    assert len({(number % 10, dash_number(number)) for number in range(40)}) == 40


def test_differences_are_the_options_that_differ(
    study: Callable[[int], Path], tmp_path: Path
) -> None:
    text = report([study(2)], mistakes=0, images_per_class=0, device="cpu")
    table = text[text.index("Options that differ") : text.index("Options of net-0")]
    assert re.findall(r'<th scope="row">(--[\w-]+)</th>', table) == ["--lr"]
    assert re.findall(r'<td class="text">([^<]*)</td>', table) == ["0.01", "0.02"]


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(three: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    shutil.copytree(three / "seed0", run)
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    (run / "best.safetensors").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    page = checked(written([str(run)], tmp_path / "page.html"))
    for text in (
        "The run is unfinished",
        "1 of 2",
        "No run has finished, so there is no confusion matrix",
        "Left out. No run of it has weights",
    ):
        assert text in page.text, text


def test_a_run_that_was_killed_before_its_first_epoch_has_no_curves(
    three: Path, tmp_path: Path
) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(three / "seed0" / "config.json", tmp_path / "begun")
    page = checked(written([str(tmp_path / "begun")], tmp_path / "page.html"))
    assert "No run has finished an epoch, so there are no curves" in page.text


def test_damaged_files_are_a_note(three: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(three / "seed0", run)
    (run / "summary.json").write_text("{")
    (run / "metrics.jsonl").write_text("[]\n")
    page = checked(written([str(run)], tmp_path / "page.html"))
    assert "The result is left out: " in page.text
    assert "The curves are left out: " in page.text


def test_without_its_data_a_page_has_no_images(three: Path, tmp_path: Path) -> None:
    page = checked(
        written([str(three), "--data", f"folder:{tmp_path / 'gone'}"], tmp_path / "page.html")
    )
    assert page.images == []
    assert "Left out. The images are not at hand: " in page.text
    assert "No images and no class distribution: " in page.text
    assert "three (3 runs): 48 test images" in page.text


def test_data_of_other_classes_is_refused_in_a_sentence(three: Path, tmp_path: Path) -> None:
    page = checked(written([str(three), "--data", "digits"], tmp_path / "page.html"))
    assert "Left out. the classes of digits (10) differ" in page.text


def test_many_classes_have_a_map_instead_of_a_table(three: Path, tmp_path: Path) -> None:
    run = tmp_path / "many"
    shutil.copytree(three / "seed0", run)
    summary = read_run(run / "summary.json")
    names = [f"class {number}" for number in range(25)]
    confusion = tuple(tuple(int(row == column) for column in range(25)) for row in range(25))
    changed = replace(summary, per_class_accuracy=dict.fromkeys(names, 1.0), confusion=confusion)
    (run / "summary.json").write_text(changed.to_json())
    page = checked(written([str(run), "--mistakes", "0"], tmp_path / "page.html"))
    assert "many: 25 test images" in page.text
    assert "class 24" in page.text  # in the table of accuracies
    assert page.loaded[0].startswith("data:image/png;base64,")  # the map
    assert 'class="confusion"' not in (tmp_path / "page.html").read_text()


HOSTILE = "<script>alert('&\"x')</script>$y_"


def test_names_from_files_are_escaped(three: Path, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    for number in range(2):
        run = tmp_path / f"{name}{number}"
        shutil.copytree(three / "seed0", run)
        summary = read_run(run / "summary.json")
        per_class = {f"{HOSTILE}\udcff{label}": 0.5 for label in "ab"}
        changed = replace(summary, per_class_accuracy=per_class, model=HOSTILE, device=HOSTILE)
        (run / "summary.json").write_text(changed.to_json())
        config = change(load_config(run / "config.json"), lr=0.1 + number)
        (run / "config.json").write_text(to_json(config))
    runs = [str(tmp_path / f"{name}{number}") for number in range(2)]
    page = checked(written([*runs, "--data", f"folder:{HOSTILE}"], tmp_path / "page.html"))
    assert HOSTILE in page.text
    assert f"{name}0" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/nothing"], "nothing is not a folder; expected the folder of a run"),
        (["{0}/empty"], "empty has no config.json and no runs"),
        (["{1}", "-o", "page.txt"], "--output page.txt: expected the name of a file that ends in"),
        (["{1}", "{1}/seed1"], "seed1 is given twice; a report has each run once"),
        (["{1}", "--mistakes", "-1"], "--mistakes -1 is out of range"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    message: str,
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main([part.format(tmp_path, three) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr("resfast.atomic.os.replace", full)
    arguments = [str(three / "seed0"), "-o", str(path), "--mistakes", "0", "--device", "cpu"]
    assert main(arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("page.html", "old")]


def test_names_are_short_and_unique(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a" / "seed0"]) == ["seed0"]
    paths = [tmp_path / "a" / "seed0", tmp_path / "a" / "seed1", tmp_path / "b"]
    assert short_names(paths) == ["a/seed0", "a/seed1", "b"]


def test_the_parts_of_the_time_are_all_of_it(three: Path) -> None:
    run = collect([three / "seed0"])[0]
    summary = read_run(three / "seed0" / "summary.json")
    assert sum(seconds_of(run).values()) == pytest.approx(summary.total_seconds)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ((), "–"),
        (True, "yes"),
        ((2, 1, 1), "2,1,1"),
        (((24, 0.5), (28, 0.8)), "24:0.5,28:0.8"),
        (1e-4, "0.0001"),
    ],
)
def test_values_are_shown_as_on_the_command_line(value: object, text: str) -> None:
    assert shown(value) == text


def test_layers_add_up(three: Path) -> None:
    (network,) = networks(groups_of(collect([three])))
    summary = read_run(three / "seed0" / "summary.json")
    *layers, total = network.table.rows
    for column, expected in ((3, summary.params), (4, summary.macs)):
        counts = [int(row[column].replace(",", "")) for row in layers]
        assert sum(counts) == expected == int(total[column].replace(",", ""))


def test_curves_have_a_point_per_evaluated_epoch(three: Path) -> None:
    text = report([three / "seed0"], mistakes=0, images_per_class=0, device="cpu")
    rows = read_rows(three / "seed0" / "metrics.jsonl")
    curves = text[text.index('id="curves"') : text.index('id="confusion"')]
    lines = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--s0\)', curves)
    assert len(lines) == 4
    assert {len(re.findall("[ML]", line)) for line in lines} == {len(rows)}


def test_a_folder_without_runs_is_an_error_of_the_function_too(tmp_path: Path) -> None:
    with pytest.raises(ResfastError, match="no runs"):
        report([tmp_path])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_network(
    scheme: str, page_of_three: Path, tmp_path: Path
) -> None:
    """In the colours of the reader's choice, and no error or request in its log."""
    window = "--window-size=900,1400"
    done = browser(tmp_path, scheme, "--screenshot=shot.png", window, page_of_three)
    assert "ERR_" not in done
    assert "Refused to load" not in done
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    corner = shot.getpixel((2, 2))
    assert isinstance(corner, tuple)
    assert (min(corner) > 240) if scheme == "light" else (max(corner) < 60)
    assert len(shot.getcolors(1 << 24) or ()) > 100


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt install chromium)")
def test_a_browser_prints_the_page(page_of_three: Path, tmp_path: Path) -> None:
    browser(tmp_path, "dark", "--no-pdf-header-footer", "--print-to-pdf=page.pdf", page_of_three)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")


def browser(folder: Path, scheme: str, *arguments: str | Path) -> str:
    """Runs Chromium without network; returns its log."""
    *options, page = map(str, arguments)
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
        *([] if scheme == "light" else ["--blink-settings=preferredColorScheme=0"]),
        *(*options, f"file://{page}"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
