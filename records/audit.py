"""Check any record folder of the field, and prove or refute the score of an artifact, on a CPU.

    # A folder of anybody, many folders, or a folder of such; with what the seeds should beat:
    python records/audit.py FOLDER... [--beats BPB] [--against FOLDER] [--json FILE]
    # A record of this repository, with its artifacts:
    python records/audit.py records/<track>/<date>_<name>
    # One artifact:
    python records/audit.py final_model.int6.ptz --log logs/<RUN_ID>.txt

A folder of anybody is compared with its own logs, whatever script, names and fields it has. A
verdict is one of: holds, does not hold (with both figures and where they stand), not stated, cannot
be checked. What the script does where it scores is listed for the reader, and is no verdict. Many
folders become one table. The exit status is 0 if nothing is wrong, 1 if something does not hold, 2
after one line for what is no record folder. Nothing of such a folder is run.

Of our own records, and of an artifact, the score is audited: a table of PASS and FAIL, with what
was found on how much. In our records what could not be checked fails, too. NOT PROVEN is what had
too little time: it refutes nothing, the line says which --minutes would do, and the exit status is
1. What the auditor verifies it computes by itself: bytes of text by decoding, log-probabilities
from the model's logits, sliding windows, an arithmetic coder. Samples are as large as `--minutes`
allows, and the table says how large they were.

The audited script runs in processes of their own, in temporary folders that hold copies of no more
than they need. A hook stops and reports connections, other programs, reading files of the
repository, the record, the data and other processes, and changing anything elsewhere. That catches
mistakes and ordinary tricks; on Linux the kernel (Landlock) denies files to libraries, too. A
script that is written to fool this auditor can reach round the hook and return any figure. Against
it only the proof by decompression holds, in which a second process turns a short file back into
validation text, and that only where the text is not to be had. So carry the folder that `--keep`
leaves to a machine that never had the text, and run `python audit.py --worker decode` in it: it
writes decoded.txt. (The demo corpus is the documentation of installed packages, which any process
can read: with it, that proof shows little about a script with bad intent.) So read the script too.
How the weights came to be is not audited: training on validation text, choosing among runs, and
times that a log states leave no trace in an artifact.

An artifact that learns while it scores (track B, TTT_ENABLED) is audited twice: as a fixed model,
and as what adapts. There the decoder learns from what it has decoded: a text that comes out of the
file was scored before anything was learnt from it. `--worker decode_documents` does that in the
folder of `--keep`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The commands share modules of data/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))
from commands import command, packages_from


@command(stopped="interrupted: nothing is proven or refuted")
def main(arguments: list[str] | None = None) -> int:
    """Audit what the arguments name, and print the table; return the exit status."""
    # Imported here, since the folder of a worker does not hold it.
    with packages_from("requirements.txt"):
        from audit_command import run
    return run(arguments, __doc__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        # One of the auditor's own processes. Its folder holds no more modules than these need, and
        # they shall look for packages nowhere beside it.
        del sys.path[1]
        from audit_confinement import confine_worker

        # Before any library has threads, which would not be held.
        held = confine_worker()
        with packages_from("requirements.txt"):
            from audit_worker import run_worker

        sys.exit(run_worker(sys.argv[2], held))
    sys.exit(main())
