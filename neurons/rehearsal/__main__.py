"""`python -m neurons.rehearsal`: runs the validators until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from neurons import home
from neurons.defaults import REHEARSAL_STATE

MAX_VALIDATORS = 64
ANNOUNCE_INTERVAL_S = 1.0

log = logging.getLogger("neurons.rehearsal")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with status 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m neurons.rehearsal",
        description="Validators on loopback that keep subnet 17's rules. Nothing reaches the Bittensor network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--validators", type=int, default=4, help="how many, UID 180 among them")
    parser.add_argument("--time-scale", type=float, default=1.0, help="divides cooldowns and every other time")
    parser.add_argument(
        "--hostile",
        nargs="*",
        default=[],
        metavar="KIND",
        help="validators to add that misbehave, such as never-answers, or keep the rules and are troublesome, "
        "such as declines, scoring-unavailable, locks, overlaps, loses-answers; all: one of each kind",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        help="JSON-lines file for what each validator that keeps the rules did, for scripts.tools.compare_with_truth",
    )
    parser.add_argument("--endpoint", default="http://127.0.0.1:10006", help="service that scores")
    parser.add_argument("--state", type=Path, default=REHEARSAL_STATE, help="folder of wallets and network.json")
    parser.add_argument("--logging.file", dest="log_file", type=Path, default=Path("logs/rehearsal.log"), help="log")
    args = parser.parse_args(argv)
    if not 1 <= args.validators <= MAX_VALIDATORS:
        parser.error(f"argument --validators: {args.validators} is not within 1 to {MAX_VALIDATORS}")
    if not 0.01 <= args.time_scale <= 1000:
        parser.error(f"argument --time-scale: {args.time_scale} is not within 0.01 to 1000")
    return args


def main() -> int:
    """Serves until a signal; the process' exit status."""
    args = parse(sys.argv[1:])
    home.prepare()
    # Only now: these bring bittensor, which takes seconds to import.
    from neurons import logging_setup
    from neurons.rehearsal.hostile import HABITS
    from neurons.rehearsal.network import RehearsalNetwork, load_pictures, load_prompts
    from neurons.rehearsal.rules import Limits
    from neurons.rehearsal.troubles import TROUBLES

    kinds = [*HABITS, *TROUBLES]
    hostile = kinds if args.hostile == ["all"] else args.hostile
    unknown = [kind for kind in hostile if kind not in kinds]
    if unknown:
        sys.exit(f"argument --hostile: {unknown[0]!r} is none of all, {', '.join(kinds)}")
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    # Blocked before any thread starts, so that sigtimedwait below gets them and nobody else.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    limits = Limits().compressed(args.time_scale)
    try:
        logging_setup.configure(args.log_file)
        network = RehearsalNetwork(
            args.state, args.endpoint, args.validators, limits, load_prompts(), hostile, load_pictures(), args.truth
        )
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    with network:
        log.info("%d validators; a task every %.0f s from each", len(network.validators), limits.task_cooldown)
        while signal.sigtimedwait(stop_signals, ANNOUNCE_INTERVAL_S) is None:
            network.announce()
        log.info("Stopping")
    return 0


if __name__ == "__main__":
    sys.exit(main())
