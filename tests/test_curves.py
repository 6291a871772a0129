"""The picture of training runs."""

from __future__ import annotations

import matplotlib
import pytest

import curves
from field_folder import CLEAN, FIELD
from field_logs import FieldLog

MARCH = CLEAN / "train_seed42.log"
APRIL = FIELD / "adapts_while_scoring/train_seed0.log"


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Pictures of few dots, which are drawn sooner."""
    monkeypatch.setattr(curves, "DOTS_PER_INCH", 20)


def test_logs_of_all_shapes_become_one_picture(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert curves.main([str(CLEAN), str(APRIL), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    assert told.out == f"{out}: 4 runs\n"
    assert "tokens are not stated, and not drawn, of train_seed0.log" in told.err


def test_each_run_has_its_curves_and_a_star_at_its_last_score(monkeypatch):
    """Over steps, seconds and tokens; the star stands where the training ended."""
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    curves.draw([FieldLog(MARCH, MARCH.name)])
    [figure] = figures
    for panel, end in zip(figure.axes[:3], (7012, 600.012, 7012 * 786432), strict=True):
        training, validation, star = panel.get_lines()
        assert len(training.get_xdata()) == 4 and len(validation.get_xdata()) == 1
        assert star.get_xdata()[0] == pytest.approx(end)
        assert star.get_ydata()[0] == 1.9205
    assert figure.axes[3].get_lines()[-1].get_ydata()[0] == 1.13739566
    [label] = {text.get_text() for text in figure.legends[0].get_texts()}
    assert label == "train_seed42.log: 1.1374"
    matplotlib.pyplot.close(figure)


def test_runs_of_one_folder_have_one_colour(tmp_path):
    march = [FieldLog(path, path.name) for path in sorted(CLEAN.glob("*.log"))]
    looks = curves.looks_of([*march, FieldLog(APRIL, APRIL.name)])
    assert len({look["color"] for look in looks[:3]}) == 1
    assert len({look["linestyle"] for look in looks[:3]}) == 3
    assert looks[3]["color"] != looks[0]["color"]
    # In one folder alone the colours tell the runs apart.
    assert len({look["color"] for look in curves.looks_of(march)}) == 3


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (600, "600"), (7000, "7k"), (1.25e6, "1.25M"), (5.5e9, "5.5B")]
)
def test_numbers_on_an_axis_are_short(value, text):
    assert curves.short_number(value) == text


def test_first_points_that_lie_far_above_do_not_flatten_the_rest():
    low, high = curves.limits([9.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2])
    assert low < 1.2 and 1.9 < high < 3
    assert curves.limits([]) is None


@pytest.mark.parametrize("case", ["absent", "no log", "nowhere"])
def test_what_cannot_be_drawn_is_refused_in_one_line(case, tmp_path, capsys):
    (tmp_path / "empty.log").write_text("nothing\n")
    arguments = {
        "absent": [tmp_path / "absent"],
        "no log": [tmp_path / "empty.log"],
        "nowhere": [MARCH, "--out", tmp_path / "absent/a.png"],
    }[case]
    assert curves.main([str(argument) for argument in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
