"""The commands of data/ on machines that lack a package, or what only Linux or Unix has."""

from __future__ import annotations

import json
import re

import pytest

from conftest import ROOT, documents
from machines import NOT_ON_WINDOWS, NOT_ON_WINDOWS_FUNCTIONS, run_python

DATA = ROOT / "data"
MODULES = sorted(path.stem for path in DATA.glob("*.py"))
# What each command imports, directly or by a module of data/.
PACKAGES = {
    "check": ("filelock", "numpy", "sentencepiece", "tqdm"),
    "demo_corpus": ("filelock", "numpy", "sentencepiece", "tqdm", "zstandard"),
    "download": ("filelock", "huggingface_hub", "numpy", "sentencepiece", "tqdm"),
    "prepare": ("filelock", "numpy", "sentencepiece", "tqdm", "zstandard"),
}


@pytest.mark.parametrize(
    "command, package",
    [(command, package) for command, packages in PACKAGES.items() for package in packages],
)
def test_a_package_that_is_missing_is_one_line(command, package):
    done = run_python(DATA / f"{command}.py", "--help", modules=[package])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: No module named '{package}': pip install -r data/requirements.txt\n"
    )


def test_requirements_list_every_package_that_a_command_imports():
    lines = (DATA / "requirements.txt").read_text().splitlines()
    listed = {re.match(r"[\w-]+", line)[0] for line in lines if line[0] not in "#-"}
    assert listed == {package for packages in PACKAGES.values() for package in packages}


def test_every_module_can_be_imported_where_the_functions_of_unix_are_not():
    script = "\n".join(f"import {module}" for module in MODULES)
    done = run_python("-c", script, modules=NOT_ON_WINDOWS, attributes=NOT_ON_WINDOWS_FUNCTIONS)
    # filelock says that its locks are weaker there.
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_work_where_the_functions_of_unix_are_not(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    built = run_python(
        DATA / "prepare.py",
        *("--name", "t", "--vocab-size", "512", "--jobs", "2", "--out", tmp_path, source),
        modules=NOT_ON_WINDOWS,
        attributes=NOT_ON_WINDOWS_FUNCTIONS,
    )
    assert built.returncode == 0, built.stderr
    checked = run_python(
        DATA / "check.py",
        tmp_path / "datasets/t_sp512",
        modules=NOT_ON_WINDOWS,
        attributes=NOT_ON_WINDOWS_FUNCTIONS,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["t_sp512"]
