"""Keeps a training run going: starts its command again after a fault, until it is done.

python launcher/supervise.py -- deepspeed --num_gpus 8 launcher/pretrain.py --config configs/lavit-7b/pretrain.yaml run_dir=runs/7b …

The run goes on from its newest good checkpoint each time. It is given up after --attempts faults at the same step, with RUN_DIR/supervisor_report.txt;
RUN_DIR/events.jsonl has everything that befell it. SIGTERM, SIGUSR1, SIGHUP or ctrl-C let the run save and stop; a second one ends it at once.

Exit code 0: done, or stopped as asked. 1: given up, or it failed while it was stopping. 143: ended at once. 2: the sentence says what is wrong with the settings.
"""

import argparse
import sys

from lavit_dist.config.command_line import exit_on_user_error
from pipelines.supervise import Patience, check_command, run_dir_of, supervise


def main() -> None:
    usual = Patience()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", metavar="DIR", help="the run folder, where the command doesn't say run_dir=…")
    parser.add_argument(
        "--attempts", type=int, default=usual.attempts, help=f"faults at one step before it is given up ({usual.attempts})"
    )
    parser.add_argument(
        "--wait", type=float, default=usual.first_wait, metavar="SECONDS", help=f"before the second start ({usual.first_wait:.0f})"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run, as one would type it")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command

    def run() -> None:
        check_command(command)
        patience = Patience(attempts=arguments.attempts, first_wait=arguments.wait)
        sys.exit(supervise(command, run_dir_of(command, arguments.run_dir), patience))

    exit_on_user_error(run)


if __name__ == "__main__":
    main()
