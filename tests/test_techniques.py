"""The report of all techniques: effects of switching on, and what is in it."""

from __future__ import annotations

import dataclasses
import json

import pytest

import techniques
from ablation_outcomes import FINISHED, Outcome, compare
from commands import BadInput
from techniques import Effect, Technique, effect_of

SKIP_GATES = Technique(
    name="skip gates",
    on="SKIP_GATES_ENABLED=1",
    off=["SKIP_GATES_ENABLED=0"],
    lines=6,
    time="1.00",
    kept="record",
    why="because",
)


def outcomes(change: str, differences: list[float]) -> list[Outcome]:
    """Finished runs of a base and of a change, which is so much above it for each seed."""
    found = []
    for seed, difference in enumerate(differences, start=1):
        name, _, value = change.partition("=")
        for changes, score in (({}, 1.5), ({name: value}, 1.5 + difference)):
            run = dict(val_bpb=score + seed / 10, train_seconds=1800.0)
            found.append(Outcome(f"run{seed}", changes, seed, FINISHED, **run))
    return found


@pytest.mark.parametrize(
    "change, sign", [("SKIP_GATES_ENABLED=1", 1), ("SKIP_GATES_ENABLED=0", -1)]
)
def test_an_effect_is_that_of_switching_on_whatever_the_base_has(change, sign):
    rows = compare(outcomes(change, [-0.02 * sign, -0.03 * sign, -0.04 * sign]))
    effect = effect_of(SKIP_GATES, rows)
    assert effect.difference == pytest.approx(-0.03)
    assert effect.low < -0.04 and -0.02 < effect.high < 0
    assert effect.low + effect.high == pytest.approx(-0.06)
    assert effect.pairs == 3


def test_one_pair_has_no_interval_and_another_change_no_effect():
    one = effect_of(SKIP_GATES, compare(outcomes("SKIP_GATES_ENABLED=0", [0.01])))
    assert one == Effect(pytest.approx(-0.01), None, None, 1)
    assert str(one) == "-0.0100, 1"
    assert effect_of(SKIP_GATES, compare(outcomes("MIN_LR=0.1", [0.01, 0.02]))) is None


def write_folder(folder, runs: list[Outcome]) -> None:
    """An experiment and a list of techniques with and without an effect in it."""
    later = SKIP_GATES._replace(name="later", on="MIN_LR=0.1", off=["MIN_LR=0"])
    other = SKIP_GATES._replace(name="nothing", on="EMA_ENABLED=1", off=[])
    content = dict(
        experiments=[
            dict(title="older model", folders=["older"]),
            dict(title="tiny model", folders=["tiny", "later"], main=True),
        ],
        techniques=[SKIP_GATES._asdict(), later._asdict(), other._asdict()],
        tables=[dict(title="Depth", text="By hand.", head=["layers", "bpb"], rows=[["4", "1.3"]])],
    )
    folder.mkdir()
    (folder / "techniques.json").write_text(json.dumps(content))
    later_runs = outcomes("MIN_LR=0.1", [0.01])
    older_runs = outcomes("SKIP_GATES_ENABLED=1", [-0.05])
    for name, its_runs in (("tiny", runs), ("later", later_runs), ("older", older_runs)):
        (folder / name).mkdir()
        report = dict(
            command=f"python records/ablate.py --out {name}",
            device=["a device"],
            versions=["a torch"],
            date="2026-01-01",
            runs=[dataclasses.asdict(run) for run in its_runs],
        )
        (folder / name / "ablation.json").write_text(json.dumps(report))


def test_the_command_writes_report_and_plot(tmp_path, monkeypatch):
    folder = tmp_path / "ablations"
    monkeypatch.setattr(techniques, "FOLDER", folder)
    write_folder(folder, outcomes("SKIP_GATES_ENABLED=0", [0.02, 0.04]))
    draw = techniques.draw
    drawn = []

    def keeping(titles, *others):
        drawn.extend(titles)
        return draw(titles, *others)

    monkeypatch.setattr(techniques, "draw", keeping)
    assert techniques.main([]) == 0
    assert drawn == ["tiny model"]
    text = (tmp_path / "ablations.md").read_text()
    assert "\n8 runs trained for 4 hours in all.\n" in text
    line = next(line for line in text.splitlines() if line.startswith("| skip gates"))
    assert line.startswith("| skip gates (`SKIP_GATES_ENABLED=1`) | -0.0300 [")
    assert line.endswith(", 2 | (1) -0.0500, 1 | 1.00 | 6 | record | because |")
    assert "\n| technique | tiny model | in other experiments | time |" in text
    assert "| later (`MIN_LR=0.1`) | +0.0100, 1 | - |" in text
    assert "| nothing (`EMA_ENABLED=1`) | - | - |" in text
    assert "\n1. older model\n" in text and "\n## 1. older model\n" in text
    assert "## Depth\n\nBy hand.\n\n| layers | bpb |\n| --- | --- |\n| 4 | 1.3 |" in text
    assert "\n## tiny model\n" in text and "| SKIP_GATES_ENABLED=0 | +0.03000 |" in text
    assert text.index("--out tiny") < text.index("--out later")
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{", "{}", '{"experiments": [{"name": "a"}], "techniques": []}'])
def test_a_list_that_is_damaged_is_named(tmp_path, monkeypatch, text):
    monkeypatch.setattr(techniques, "FOLDER", tmp_path)
    (tmp_path / "techniques.json").write_text(text)
    with pytest.raises(BadInput, match="techniques.json"):
        techniques.read_list(tmp_path)
