"""Anyone's text becomes a tokenizer and token shards for train_gpt.py.

    python data/prepare.py --name mytext --vocab-size 4096 [--case-operators] PATH...
    python data/prepare.py --name mytext --tokenizer FILE [--normalized] PATH...

PATH is a .txt, .md or .jsonl file, one of these with .gz or .zst, a folder (all such files in it
and below, links followed, but not in hidden folders), or `-` for standard input. It writes, under
data/ or `--out`, tokenizers/mytext_4096_bpe.model and in datasets/mytext_sp4096 the shards
mytext_train_000000.bin, mytext_val_000000.bin and so on, with manifest.json; the last line it
prints is the command that trains on them. What happens to the text:

- A document is a file; a line of a .jsonl; with `--separator` what is between two separators. It is
  kept to the byte, but for a byte order mark at a file's beginning, for U+2581, which SentencePiece
  keeps for the space and which becomes "_", and for its length: over 64 KB it is cut behind a
  paragraph, else a line, else a word. The pieces are documents of their own, and can be on both
  sides of the split.
- Documents of nothing but white space and exact duplicates go. The rest are put in the order of
  their SHA-256, a shuffle that neither names nor order of the files can change. The first 3% of the
  bytes are held out.
- The tokenizer is byte-pair encoding that gives every text back unchanged, trained on the training
  side only, on its first 100 MB. Every document is encoded, decoded and compared.
- With `--case-operators` capitals are rewritten before the tokenizer sees them (case_operators.py),
  and written back by whatever decodes; the names end in _caseops then.
- A given tokenizer that normalizes text, as both public ones of 8,192 pieces do, is refused where
  it changes a document. With `--normalized` documents are first brought into the form that it gives
  back, then compared, split and encoded: the text to be scored is what is left, and bytes are those
  of that text. The names end in _normalized, the manifest says what share changed, and a score on
  it is none of the original text's.

Memory does not grow with the input: documents are sorted on disk (which takes about the text's size
there, beside the output, and the shards come on top), encoded in chunks and written as they come.
The output depends on the documents, the options and the version of SentencePiece alone, and appears
all at once: a build that is stopped leaves nothing, one that is killed leaves a hidden folder that
the next one completes or removes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from commands import BadInput, Parser, command, packages_from

with packages_from("data/requirements.txt"):
    from dataset import HELD_OUT, Plan, build
    from documents import Input
    from files import digest
    from manifest import command_to_train
    from tokenizer import open_tokenizer
    from workers import cores

DEFAULT_VOCABULARY_SIZE = 1024
# What --separator may have in place of a character.
ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, or - for standard input"
    )
    parser.add_argument("--name", required=True, help="of the data set: letters, digits and . _ -")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"pieces of the tokenizer [{DEFAULT_VOCABULARY_SIZE}]",
    )
    parser.add_argument(
        "--case-operators",
        action="store_true",
        help="rewrite capitals as operators, so that a word has the same pieces in any case",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="FOLDER",
        help="where datasets/ and tokenizers/ are [%(default)s]",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a SentencePiece model to use instead of a new one",
    )
    parser.add_argument(
        "--normalized",
        action="store_true",
        help="let the given tokenizer normalize the text; what is left is the text to be scored",
    )
    parser.add_argument(
        "--separator",
        default="",
        metavar="TEXT",
        help=r"between documents of a text file, as \n\n [a file is one document]",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of a .jsonl line that has the text [%(default)s]",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="what standard input is [%(default)s]",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=HELD_OUT,
        metavar="FRACTION",
        help="the part of the bytes for validation [%(default)s]; of a small text up to a tenth, "
        "but not over 200 KB for that",
    )
    parser.add_argument(
        "--jobs", type=int, default=cores(), metavar="N", help="processes [%(default)s, the cores]"
    )
    parser.add_argument(
        "--force", action="store_true", help="build it even if it is there, and replace what is"
    )
    return parser.parse_intermixed_args(arguments)


def read_input(options: argparse.Namespace) -> Input:
    """Return the files that the options name, and how they are read."""
    separator = re.sub(r"\\[nrt\\]", meant, options.separator)
    try:
        separator_bytes = separator.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"--separator {options.separator!r}: not UTF-8") from error
    return Input(options.paths, separator_bytes, options.text_field, options.format)


def meant(escape: re.Match) -> str:
    """Return the character that an escape stands for."""
    return ESCAPES[escape[0]]


def check_options(options: argparse.Namespace) -> None:
    """Raise BadInput for what cannot be."""
    allowed = re.fullmatch(r"[A-Za-z0-9][\w.-]*", options.name, re.ASCII)
    if not allowed or re.search("_(train|val)_", f"{options.name}_"):
        raise BadInput(
            f"--name {options.name!r}: letters, digits and . _ - only, and neither _train nor "
            "_val, which are the splits"
        )
    if not 0 < options.held_out <= 0.5 or options.jobs < 1:
        raise BadInput("--held-out is over 0 and at most 0.5, and --jobs at least 1")
    if options.normalized and options.tokenizer is None:
        raise BadInput(
            "--normalized is for a --tokenizer that is given: a new one changes no text, so leave "
            "it out"
        )


def check_tokenizer(path: Path, vocabulary_size: int | None) -> int:
    """Return the pieces of a tokenizer that is given; BadInput if it cannot be used."""
    tokenizer = open_tokenizer(path)
    missing = tokenizer.lacks()
    if missing:
        raise BadInput(
            f"{path}: it needs {' and '.join(missing)}: leave --tokenizer out to train one"
        )
    size = tokenizer.size
    if vocabulary_size not in (None, size):
        raise BadInput(f"{path} has {size} pieces, not {vocabulary_size}: leave --vocab-size out")
    return size


def plan_of(options: argparse.Namespace, source: Input) -> Plan:
    """Return what the options ask for; BadInput for what cannot be."""
    check_options(options)
    size = options.vocab_size
    given_digest = None
    if options.tokenizer is not None:
        size = check_tokenizer(options.tokenizer, options.vocab_size)
        given_digest = digest(options.tokenizer)
    elif size is None:
        size = DEFAULT_VOCABULARY_SIZE
    case_operators = options.case_operators
    if options.tokenizer is not None:
        case_operators = open_tokenizer(options.tokenizer).case_operators
        if options.case_operators and not case_operators:
            raise BadInput(
                f"{options.tokenizer} has no pieces for --case-operators: leave one of them out"
            )
    if options.normalized and not open_tokenizer(options.tokenizer).normalizes():
        raise BadInput(f"{options.tokenizer} changes no text: leave --normalized out")
    # What was built before there were operators has this identity, without them.
    told = [options.name, size, given_digest, options.held_out]
    ending = ""
    if case_operators:
        told.append("case operators")
        ending = "_caseops"
    if options.normalized:
        told.append("normalized")
        ending += "_normalized"
    root = options.out.resolve()
    model = f"{options.name}_{size}_bpe{ending}.model"
    return Plan(
        name=options.name,
        folder=(root / "datasets" / f"{options.name}_sp{size}{ending}").resolve(),
        tokenizer=(root / "tokenizers").resolve() / model,
        vocabulary_size=size,
        case_operators=case_operators,
        inputs=source.identity(*told),
        held_out=options.held_out,
        jobs=options.jobs,
        given_tokenizer=options.tokenizer,
        normalized=options.normalized,
    )


@command(stopped="interrupted: nothing half done is left")
def main(arguments: list[str] | None = None) -> None:
    """Build the data set that the options ask for and say how to train on it."""
    options = parse(arguments)
    source = read_input(options)
    plan = plan_of(options, source)
    texts = source.texts(plan.counts, f"{plan.name}: reading")
    build(plan, texts, options.force, replace=options.force)
    training = command_to_train(plan.folder)
    print(f"to train on it: {training}")


if __name__ == "__main__":
    sys.exit(main())
