"""The report: self-contained, well-formed, the same bytes every time, every number from the folder."""

from __future__ import annotations

import base64
import io
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_job import IMAGES, SETTINGS, finished

from flowfast.experiments import JobSettings
from flowfast.report import figures, numbers, pictures, write_report
from flowfast.storage import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

VOID = {"meta", "link", "img", "br", "hr", "input"}


class _Page(HTMLParser):
    """Collects what the tests ask about, and checks that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.uses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("settings", [SETTINGS, IMAGES], ids=["points", "images"])
def test_page_is_well_formed_and_needs_nothing_from_outside(settings: JobSettings) -> None:
    text = write_report(finished(settings).folder).read_text()
    page = _Page(text)
    assert not page.open and text.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids)), "ids of several figures collide"
    assert all(use.startswith(("data:", "#")) for use in page.uses)
    assert not page.tags & {"script", "iframe", "object", "embed"} and "@import" not in text
    assert {use[1:] for use in page.uses if use.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert not re.search(r"url\((?!#)", text)
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(figure)
    assert not {"None", "nan", "Undefined"} & set(page.text.split())


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(finished().folder).read_bytes()
    shutil.copytree(finished().folder, tmp_path / "elsewhere")
    assert write_report(tmp_path / "elsewhere").read_bytes() == first


def test_numbers_on_the_page_are_the_stored_ones(tmp_path: Path) -> None:
    shutil.copytree(finished().folder, tmp_path / "job")
    stored = read_json(tmp_path / "job" / "results.json", "results")
    stored["grids"][0] |= {"composed": 0.0123, "same_component": 0.777, "training_seconds": 754.0}
    stored["teacher"]["evaluations"] = 4321.0
    write_json(tmp_path / "job" / "results.json", stored)
    text = _Page(write_report(tmp_path / "job").read_text()).text
    for said in ("0.0123", "77.7 %", "12 min 34 s", "4,320"):
        assert said in text


def test_text_from_the_user_is_escaped(tmp_path: Path) -> None:
    shutil.copytree(finished().folder, tmp_path / "job")
    stored = read_json(tmp_path / "job" / "results.json", "results")
    stored["settings"]["name"] = "<script>alert(1)</script> & co"
    write_json(tmp_path / "job" / "results.json", stored)
    page = _Page(write_report(tmp_path / "job").read_text())
    assert "script" not in page.tags and "<script>alert(1)</script> & co in 2 steps" in page.text


def test_every_figure_names_its_axes() -> None:
    result = finished()
    arrays = {name: tensor.numpy() for name, tensor in result.arrays().items()}
    errors = {grid.kind: arrays[f"errors_{grid.kind}"] for grid in result.grids}
    points = {grid.kind: arrays[f"student_{grid.kind}"] for grid in result.grids}
    drawn = [
        figures.profile(arrays, result.regimes),
        figures.grid_points(result.grids),
        figures.segment_errors(result.grids),
        figures.error_shares(arrays["error_levels"], errors),
        figures.scatter(arrays["teacher"], points, arrays["explained"]),
    ]
    for figure in drawn:
        assert all(axes.get_xlabel() for axes in figure.axes if axes.get_visible())
        assert figure.axes[0].get_ylabel() or figure.axes[0].get_yticklabels()


def test_a_users_matplotlib_settings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    result = finished()
    plain = figures.to_svg(figures.grid_points(result.grids), "grids", "grids")
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert figures.to_svg(figures.grid_points(result.grids), "grids", "grids") == plain
    assert "<style" not in plain and "<metadata" not in plain


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_as_files_are_the_same_bytes_each_time(kind: str) -> None:
    result = finished()
    arrays = {name: tensor.numpy() for name, tensor in result.arrays().items()}
    once, twice = (figures.to_file(figures.profile(arrays, result.regimes), kind) for _ in range(2))
    assert once == twice and len(once) > 1_000


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_keep_every_pixel(dark: bool) -> None:
    from PIL import Image

    x = np.array([[0.0, 1.0, 0.5, 2.0], [1.0, 1.0, -3.0, 0.0]])
    data = base64.b64decode(pictures.row(x, (2, 2), 0.0, 1.0, dark=dark).split(",")[1])
    strip = np.asarray(Image.open(io.BytesIO(data)))
    scale = strip.shape[0] // 2
    images = [strip[scale // 2 :: scale, start : start + 2 * scale][:, scale // 2 :: scale] for start in (0, 3 * scale)]
    expected = np.round(255 * np.abs(float(dark) - np.clip(x, 0, 1))).reshape(2, 2, 2)
    assert np.array_equal(np.stack(images), expected)
    assert (strip[:, 2 * scale : 3 * scale] == 255).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0871234, "0.0871"), (12345.6, "12,300"), (1.0, "1.00"), (0.9999, "1.00"), (99.96, "100"),
        (1.234e-7, "1.23 × 10⁻⁷"), (5e9, "5.00 × 10⁹"), (0, "0"), (-23.14, "−23.1"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert numbers.number(value) == text


def test_numbers_in_other_forms() -> None:
    assert [numbers.short(x) for x in (1.0, 0.75, 0.0115, 100.0, 2e-9)] == ["1", "0.75", "0.0115", "100", "2 × 10⁻⁹"]
    assert [numbers.seconds(x) for x in (0.00193, 4.5, 99.4, 125.0, 3600)] == [
        "1.93 ms", "4.50 s", "99.4 s", "2 min 05 s", "60 min 00 s",
    ]  # fmt: skip
    assert [numbers.power_of_ten(x) for x in (1e-3, 0.01, 1, 1000, 1e4)] == ["10⁻³", "0.01", "1", "1000", "10⁴"]
    assert numbers.percent(0.934) == "93.4 %"


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no flowfast job"):
        write_report(tmp_path)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished job"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"grids": [], "teacher": {}}')
    with pytest.raises(ValueError, match=r"results\.json was not written by this version"):
        write_report(tmp_path)
