"""A record folder as others of the field make them, to be doctored by tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from checks import Verdict
from conftest import ROOT
from field_record import FieldRecord
from review import Review, review

FIELD = ROOT / "tests/field_records"
CLEAN = FIELD / "clean_three_seeds"


class Folder:
    """A copy of one of the made-up folders, in a track's folder."""

    def __init__(self, above: Path, name: str = "clean_three_seeds", track: str = "10min_16mb"):
        self.path = above / f"track_{track}" / name
        shutil.copytree(FIELD / name, self.path)

    def log(self, seed: int = 42) -> Path:
        """A seed's log."""
        return self.path / f"train_seed{seed}.log"

    def change_logs(self, old: str, new: str, *seeds: int) -> None:
        """Replace a text in the logs of these seeds, or in all; it must be there."""
        for seed in seeds or (42, 1337, 2024):
            text = self.log(seed).read_text()
            assert old in text, old
            self.log(seed).write_text(text.replace(old, new))

    def add_to_logs(self, text: str, before: str = "seed:") -> None:
        """Put lines into all logs, before the first line that begins so."""
        for path in self.path.glob("*.log"):
            lines = path.read_text().splitlines()
            at = next(number for number, line in enumerate(lines) if line.startswith(before))
            path.write_text("\n".join([*lines[:at], text, *lines[at:], ""]))

    @property
    def stated(self) -> dict:
        """What submission.json says."""
        return json.loads((self.path / "submission.json").read_text())

    def state(self, **changes: object) -> None:
        """Change fields of submission.json; None leaves one out."""
        stated = {**self.stated, **changes}
        kept = {name: value for name, value in stated.items() if value is not None}
        (self.path / "submission.json").write_text(json.dumps(kept))

    def readme(self, text: str) -> None:
        """Write another README.md."""
        (self.path / "README.md").write_text(text)

    def review(self) -> Review:
        """What a reviewer gets of it; no check may fail to make sense of it."""
        found = review(FieldRecord(self.path))
        assert not [each for each in found.verdicts if "files are not understood" in each.text]
        return found

    def verdict(self, check: str) -> Verdict:
        """The verdict of one check."""
        [found] = [verdict for verdict in self.review().verdicts if verdict.check == check]
        return found

    def failures(self) -> list[str]:
        """The names of what does not hold."""
        return [verdict.check for verdict in self.review().failures]
