"""Compare changes of train_gpt.py's settings with a base configuration, each with several seeds.

    python records/ablate.py --seeds 3 BACKOUT_ENABLED=0 XSA_LAST_N=0,4 \\
        "EMA_ENABLED=1 EMA_EVERY=1"
    python records/ablate.py --base ITERATIONS=400 --grid MATRIX_LR=0.02,0.03 MUON_WD=0,0.04
    python records/ablate.py --equal seconds QUANT=rows \\
        --launcher "torchrun --standalone --nproc_per_node=8"
    python records/ablate.py --base "PRESET=record ITERATIONS=7000" --jobs 8 \\
        --launcher "srun -n1 --gpus=1 python" QUANT=rows

Each argument is a change: values behind commas are tried in turn, what is quoted together changes
together. The base is train_gpt.py's defaults, the settings in the environment, and --base. With
--equal tokens a run ends by ITERATIONS, scaled where TRAIN_BATCH_TOKENS changes (tokens are
positions, memory tokens included, as train_gpt.py counts them); with --equal seconds it ends by the
base's MAX_WALLCLOCK_SECONDS; without --equal it is tokens where ITERATIONS is set, else seconds.
Each run has a folder of its own in --out, with its log. The same command, called again, runs only
what has not finished; changes and seeds may be added to it.

Without a launcher, or with torchrun, --jobs divides this machine's GPUs and cores. Any other
launcher is a command in front of the script's path that places its runs itself; it needs PRESET,
for `auto` may be another one where they run. If it loses the environment or the folder, {env} in it
stands for `env NAME=VALUE...` and {folder} for the run's folder, which must be there too (a shared
file system): --launcher "ssh gpu1 'cd {folder} && {env} python3'". Ctrl-C and SIGTERM end what was
started here; of a run behind ssh that is ssh, and the run itself may go on where it is.

It writes ablation.md, ablation.json and ablation.png, with no private folder's name in them. They
lead with the difference to the base in pairs, since the runs of a seed share their data; Welch's
test, which takes runs as independent, is beside it. --publish FOLDER makes a folder of these
(ablation.md is its README.md) and the script, once all runs have ended; its place is
records/track_<track>/<date>_<name>. The exit status is 0 if every run has finished, 1 if one
failed, 2 after one line for what cannot be run, 130 if it was stopped.

    python records/ablate.py --redraw records/track_pocket/2026-11-22_Ablation --out plot.png

runs nothing: it prints the table of an earlier ablation and draws its plot.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

# The commands share modules of data/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

from commands import BadInput, Parser, command, packages_from, say

with packages_from("requirements.txt"):
    from ablation_outcomes import compare
    from ablation_plan import CLOCK, Ablation, parse_seeds
    from ablation_plot import draw
    from ablation_report import check_target, publish, read_report, results_table, write_report
    from ablation_runs import Pool, StoppedRuns, divide, runs_elsewhere, supervise, unfinished
    from files import write_atomically
    from manifest import ROOT

# Imported only when a report is made, since they take a second.
PACKAGES = ("scipy", "matplotlib", "tqdm")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options and changes of the command line, and that line itself."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="", metavar="'NAME=VALUE ...'", help="settings of all runs")
    add(
        "--seeds",
        default="3",
        metavar="N|SEED,...",
        help="how many, from 1 on, or which (default: 3)",
    )
    add("--jobs", default="1", metavar="N", help="runs at the same time")
    add("--launcher", default="", metavar="COMMAND", help="put in front of the script's path")
    add(
        "--name",
        default="ablation",
        metavar="NAME",
        help="the folder is logs/ablations/NAME",
    )
    add("changes", nargs="*", metavar="NAME=VALUE", help="a change; none: only the base")
    add("--grid", action="store_true", help="the product of all arguments, not one at a time")
    add(
        "--equal",
        choices=("tokens", "seconds"),
        help="what runs share (default: tokens if ITERATIONS is set, else seconds)",
    )
    add("--out", type=Path, help="another folder; with --redraw the .png to write")
    add("--publish", type=Path, metavar="FOLDER", help="a new folder for report and script")
    add("--redraw", type=Path, metavar="FOLDER", help="only table and plot of an earlier ablation")
    add("--script", type=Path, default=ROOT / "train_gpt.py", help="another train_gpt.py")
    add("--keep-artifacts", action="store_true", help="keep the *.ptz, up to 32 MB a run")
    options = parser.parse_intermixed_args(arguments)
    options.command = shlex.join(["python", "records/ablate.py", *arguments])
    return options


def check_packages() -> None:
    """BadInput for a package that the report would lack after all runs."""
    for name in PACKAGES:
        if not importlib.util.find_spec(name):
            raise BadInput(f"{name} is not installed: pip install -r records/requirements.txt")


def parse_launcher(text: str) -> list[str]:
    """The launcher's words, none without one; BadInput if it cannot be called."""
    try:
        launcher = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--launcher {text}: {error}") from None
    if not launcher:
        return launcher
    if not shutil.which(launcher[0]):
        raise BadInput(f"--launcher {text}: there is no program {launcher[0]}")
    if os.sep in launcher[0]:
        # Runs have other working folders.
        launcher[0] = os.path.abspath(launcher[0])
    return launcher


def parse_jobs(text: str) -> int:
    """How many runs at the same time."""
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--jobs {text} must be a whole number of at least 1")
    return int(text)


def announce(ablation: Ablation, equal: str | None, jobs: int) -> None:
    """Say what people should know before the runs begin."""
    for warning in ablation.reader.script.mistyped_settings(os.environ):
        say(warning)
    if not equal:
        name = "ITERATIONS" if ablation.equal == "tokens" else CLOCK
        value = ablation.base.settings[name.lower()]
        say(f"--equal {ablation.equal}: runs end by {name}={value:g}")
    if ablation.equal == "seconds" and jobs > 1:
        say("warning: --equal seconds with --jobs above 1: the runs slow each other down")


def redraw(folder: Path, picture: Path | None) -> int:
    """Print the table of an earlier ablation and draw its plot; exit status 0."""
    check_packages()
    if picture is None or picture.suffix != ".png":
        raise BadInput("--redraw needs --out FILE.png, the picture to write")
    outcomes = read_report(folder)
    rows = compare(outcomes)
    write_atomically(picture, draw(rows, outcomes))
    print("\n".join(results_table(rows)))
    print(picture)
    return 0


def ablate(options: argparse.Namespace) -> int:
    """Check everything, run what has not finished, write the report; the exit status."""
    check_packages()
    launcher = parse_launcher(options.launcher)
    jobs = parse_jobs(options.jobs)
    seeds = parse_seeds(options.seeds)
    if options.publish:
        check_target(options.publish)

    folder = options.out or Path("logs", "ablations", options.name)
    ablation = Ablation(options.script, options.base, options.equal, folder)
    configurations = ablation.configurations(options.changes, options.grid)
    base = ablation.base.settings
    if runs_elsewhere(launcher) and base["preset"] == "auto":
        raise BadInput(
            f"--launcher {options.launcher}: PRESET=auto may be another there: set it in --base"
        )
    slots = divide(jobs, launcher, on_gpus=base["device"] != "cpu")
    asked = []
    for seed in seeds:
        asked += [ablation.run(configuration, seed) for configuration in configurations]

    with ablation.claim() as lock:
        waiting = unfinished(asked, ablation)
        ablation.add_to_plan(configurations, seeds)
        announce(ablation, options.equal, jobs)
        before = len(asked) - len(waiting)
        say(f"{ablation.folder}: {len(asked)} runs, {before} of them have finished before")
        pool = Pool(ablation, launcher, slots, lock, options.keep_artifacts)
        report = functools.partial(write_report, ablation, options.name, options.command, asked)
        outcomes = supervise(pool, len(asked), waiting, report)
        if options.publish:
            publish(ablation, options.publish)

    print("\n".join(results_table(compare(outcomes))))
    print(f"{ablation.folder}/ablation.md, .json, .png")
    if options.publish:
        print(f"published: {options.publish}")
    names = {run.name for run in asked}
    unsuccessful = [each for each in outcomes if each.name in names and not each.finished]
    return 1 if unsuccessful else 0


@command()
def main(arguments: list[str] | None = None) -> int:
    """Carry out the command; its exit status."""
    # A closed terminal stops it too, unless nohup says that it shall not. Windows has no SIGHUP.
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, signal.default_int_handler)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.redraw:
            return redraw(options.redraw, options.out)
        return ablate(options)
    except KeyboardInterrupt as stop:
        what = str(stop) if isinstance(stop, StoppedRuns) else "nothing was at work"
        print(f"\nstopped: {what}; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
