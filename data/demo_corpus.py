"""Build the demo corpus: a small training and validation set for machines without FineWeb shards.

    python data/demo_corpus.py [--output FOLDER] [--vocab-size N] [--case-operators] [--force]

The text is the documentation inside the installed dependencies: the docstrings of Python's standard
library, torch, numpy, sympy and networkx, found by parsing their sources (nothing is imported,
nothing is downloaded). The data set is made of it as data/prepare.py does: the output folder holds
a SentencePiece tokenizer trained on the training split, both splits as token shards, and
`meta.json` with the counts. The same package versions give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from commands import BadInput, Parser, command, packages_from, say

with packages_from("data/requirements.txt"):
    from tqdm import tqdm

    import dataset
    from workers import cores

DEFAULT_OUTPUT = Path(__file__).parent / "demo"
# The best of 1,024 to 8,192 at equal seconds, with operators for letter case: records/vocabulary/
DEFAULT_VOCABULARY_SIZE = 4096
DEFAULT_CASE_OPERATORS = True
PACKAGES = ("torch", "numpy", "sympy", "networkx")
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Characters; shorter docstrings are mostly one-line summaries.
LONGEST_IGNORED_DOCUMENT = 300


# ---- Sources
def source_folders() -> dict[str, Path]:
    """Locate each source of documents without importing it.

    Packages that are not installed are left out with a note; the standard library must be there.
    """
    folders = {"python": Path(sysconfig.get_paths()["stdlib"])}
    if not folders["python"].is_dir():
        raise BadInput(f"the standard library's sources are not at {folders['python']}")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            say(f"demo corpus: {package} is not installed and is left out")
        else:
            folders[package] = Path(spec.origin).parent
    return folders


def python_files(folder: Path) -> list[Path]:
    """List the Python sources under `folder`, without tests and packages installed inside it."""
    paths = []
    for path in folder.rglob("*.py"):
        excluded = EXCLUDED_FOLDERS.intersection(path.relative_to(folder).parts)
        if path.is_file() and not excluded:
            paths.append(path)
    return sorted(paths)


# ---- Docstrings
def docstrings(source: bytes) -> Iterator[str]:
    """Yield each docstring in a module's source, as written.

    Compiled functions get theirs from calls such as `add_docstr(torch.abs, "...")` or
    `add_newdoc(...)`, so the string constants in the arguments of such calls count too (of a
    template, the raw template). SyntaxError or ValueError if this Python cannot parse the source.
    """
    with warnings.catch_warnings():
        # The sources' invalid escapes are not the user's concern.
        warnings.simplefilter("ignore")
        pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=False) or ""
        elif isinstance(node, ast.Call) and sets_docstring(node):
            yield from string_constants(node)
        # Docstrings are in statements and in calls: not entering other expressions saves a third
        # of the time.
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) or not isinstance(child, ast.expr):
                pending.append(child)


def sets_docstring(call: ast.Call) -> bool:
    """Tell whether the called function's name says that it attaches a docstring to an object."""
    name = ""
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
    elif isinstance(call.func, ast.Name):
        name = call.func.id
    return "docstr" in name or "newdoc" in name


def string_constants(call: ast.Call) -> Iterator[str]:
    """Yield the strings in a call."""
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def installed_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (source name, docstring as written) for every docstring under `source_folders()`."""
    for source, folder in source_folders().items():
        for path in tqdm(python_files(folder), desc=f"demo: reading {source}", unit=" files"):
            try:
                found = list(docstrings(path.read_bytes()))
            except (SyntaxError, ValueError, RecursionError) as error:
                say(f"demo corpus: left out {path}, which cannot be parsed: {error}")
                continue
            for text in found:
                yield source, text


# ---- Documents
def distinct(sourced_texts: Iterable[tuple[str, str]], by_source: Counter) -> Iterator[str]:
    """Clean (source name, docstring) pairs and yield each long text once.

    The first source of a text counts it.
    """
    seen = set()
    for source, text in sourced_texts:
        document = inspect.cleandoc(text).strip()
        if len(document) > LONGEST_IGNORED_DOCUMENT and document not in seen:
            seen.add(document)
            by_source[source] += 1
            yield document


def documents(by_source: Counter) -> Iterator[str]:
    """Yield the documents of the installed packages and count them by their source."""
    with collector_resting():
        yield from distinct(installed_docstrings(), by_source)


@contextlib.contextmanager
def collector_resting() -> Iterator[None]:
    """Switch the garbage collector off.

    Syntax trees have no cycles, but looking for them would take a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---- The data set
def plan_of(
    output: Path, vocabulary_size: int, case_operators: bool, jobs: int, by_source: Counter
) -> dataset.Plan:
    """Return what to build: everything in one folder, from whatever versions are installed."""
    capitals = "capitals as operators" if case_operators else "capitals as they are"
    # Of a symbolic link, the folder it points to is replaced.
    folder = output.resolve()
    return dataset.Plan(
        name="demo",
        folder=folder,
        tokenizer=folder / "tokenizer.model",
        vocabulary_size=vocabulary_size,
        case_operators=case_operators,
        manifest="meta.json",
        inputs=f"docstrings of installed packages, {vocabulary_size} pieces, {capitals}",
        jobs=jobs,
        packages=PACKAGES,
        more={"documents_by_source": by_source},
    )


def build(
    output: Path,
    vocabulary_size: int = DEFAULT_VOCABULARY_SIZE,
    case_operators: bool = DEFAULT_CASE_OPERATORS,
    force: bool = False,
    jobs: int = 1,
) -> Path:
    """Build the corpus in the folder `output` and return it, unless it is there (and not `force`).

    One of another size or a damaged one is replaced. Raises BadInput or OSError.
    """
    by_source = Counter()
    plan = plan_of(output, vocabulary_size, case_operators, jobs, by_source)
    dataset.build(plan, documents(by_source), force, replace=True)
    return output


# ---- The command
def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FOLDER",
        help="where the corpus goes [%(default)s]",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCABULARY_SIZE,
        metavar="N",
        help="pieces of the tokenizer [%(default)s]",
    )
    parser.add_argument(
        "--case-operators",
        action=argparse.BooleanOptionalAction,
        default=DEFAULT_CASE_OPERATORS,
        help="rewrite capitals as operators, as data/prepare.py can",
    )
    parser.add_argument(
        "--force", action="store_true", help="build even if the corpus is already there"
    )
    return parser.parse_args(arguments)


@command(stopped="interrupted: nothing half done is left")
def main(arguments: list[str] | None = None) -> None:
    """Build what the options ask for."""
    options = parse(arguments)
    build(options.output, options.vocab_size, options.case_operators, options.force, cores())


if __name__ == "__main__":
    sys.exit(main())
