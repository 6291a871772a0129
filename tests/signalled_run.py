"""The script, with a signal at an exact moment: a rank sends it once it has logged a certain line.

    python tests/signalled_run.py RANK LINE SIGNAL TARGET

LINE is the beginning of a line, TARGET is `itself` or `launcher`. So a test need not catch a run in
the right moment from outside, which a busy machine would let pass.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import train_gpt


def main() -> int:
    """The exit status of the script."""
    rank, beginning, name, target = sys.argv[1:]
    sys.argv[1:] = []
    log = train_gpt.Logger.__call__

    def log_and_signal(logger: train_gpt.Logger, line: str, console: bool = True) -> None:
        log(logger, line, console)
        if not line.startswith(beginning) or os.environ.get("RANK", "0") != rank:
            return
        receiver = os.getppid() if target == "launcher" else os.getpid()
        os.kill(receiver, signal.Signals[name])
        while train_gpt.STOP.number == 0:
            time.sleep(0.01)

    train_gpt.Logger.__call__ = log_and_signal
    return train_gpt.main()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # As the script ends: threads of gloo may abort an interpreter that ends in the ordinary way.
    os._exit(status)
