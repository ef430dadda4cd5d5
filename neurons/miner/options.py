"""The miner's command line, after bittensor's conventions. Imports nothing slow, so that --help is quick."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.log_lines import shown_network
from neurons.defaults import DATA, NETUID, REHEARSAL, REHEARSAL_HOTKEY, REHEARSAL_STATE, REHEARSAL_WALLET
from neurons.miner.validators.blacklist import parse_entry

# Known to hand out tasks and give no rewards.
DEFAULT_BLACKLIST = (180,)
DEFAULT_ENDPOINT = "http://127.0.0.1:10006"
LEDGER_NAME = "ledger.sqlite"
SPOOL_NAME = "spool"
METRICS_PORT = 10007


@dataclass(frozen=True)
class MinerOptions:
    """What one miner process runs with. `network` is rehearsal, finney, test, or a chain's ws:// address.

    `spool` and `ledger` where they are named; `spool_of` and `ledger_of` say where they are in any case.
    """

    network: str
    wallet_name: str
    wallet_hotkey: str
    wallet_path: Path
    netuid: int = NETUID
    workers: int = 4
    endpoints: tuple[str, ...] = (DEFAULT_ENDPOINT,)
    retries: int = 2
    blacklist: frozenset[int | str] = frozenset(DEFAULT_BLACKLIST)
    blacklist_file: Path | None = None
    validation_threshold: float = 0.6
    spool: Path | None = None
    ledger: Path | None = None
    metrics_port: int = METRICS_PORT
    min_reward: float = 0.0
    rehearsal_state: Path = REHEARSAL_STATE
    log_file: Path = Path("logs/miner.log")
    status_file: Path | None = None

    def spool_of(self, hotkey: str) -> Path:
        return self.spool or self._home(hotkey) / SPOOL_NAME

    def ledger_of(self, hotkey: str) -> Path:
        return self.ledger or self._home(hotkey) / LEDGER_NAME

    def _home(self, hotkey: str) -> Path:
        """For what is this hotkey's on this network alone: cooldowns, and results that it has to sign."""
        if self.network == REHEARSAL:
            # Its wallet is in there, too, and nothing that was practice may look like earnings.
            return self.rehearsal_state
        network = re.sub(r"[^A-Za-z0-9.]+", "-", shown_network(self.network))
        return DATA / f"{network}-{self.netuid}-{hotkey}"


def parse(argv: list[str]) -> MinerOptions:
    """Options from the command line. Exits with a usage message when they make no sense."""
    parser = _parser()
    args = parser.parse_args(argv)
    network = args.network
    if network == "auto":
        network = "finney" if args.wallet_name else REHEARSAL
    if network not in (REHEARSAL, "finney", "test") and not network.startswith(("ws://", "wss://")):
        parser.error(f"argument --network: {network!r} is none of auto, rehearsal, finney, test, ws://..., wss://...")
    if network == REHEARSAL:
        # Its own wallet, made without a password: real keys have no business in a practice run.
        name, hotkey, path = REHEARSAL_WALLET, REHEARSAL_HOTKEY, args.rehearsal_state / "wallets"
    else:
        name, hotkey, path = args.wallet_name or "default", args.wallet_hotkey, args.wallet_path
    try:
        path = path.expanduser()
    except RuntimeError:
        parser.error(f"argument --wallet.path: this user has no home folder, so {path} is nowhere")
    return MinerOptions(
        network=network,
        wallet_name=name,
        wallet_hotkey=hotkey,
        wallet_path=path,
        netuid=args.netuid,
        workers=args.workers,
        endpoints=tuple(dict.fromkeys(args.endpoints or [DEFAULT_ENDPOINT])),
        retries=args.retries,
        blacklist=frozenset(args.blacklist),
        blacklist_file=args.blacklist_file,
        validation_threshold=args.validation_threshold,
        spool=args.spool,
        ledger=args.ledger,
        metrics_port=args.metrics_port,
        min_reward=args.min_reward,
        rehearsal_state=args.rehearsal_state,
        log_file=args.log_file,
        status_file=args.status_file,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neurons.serve_miner_competitive",
        description="Competitive miner for Bittensor subnet 17 (404-GEN).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        *("--network", "--subtensor.network"),
        dest="network",
        default="auto",
        help="rehearsal, finney, test, ws://... or auto: finney when a wallet is named, else rehearsal",
    )
    add("--netuid", type=_integer(0, 65535), default=NETUID, help="subnet")
    add("--wallet.name", dest="wallet_name", default="", help="wallet (coldkey) name; not used in a rehearsal")
    add("--wallet.hotkey", dest="wallet_hotkey", default="default", help="hotkey name; not used in a rehearsal")
    add("--wallet.path", dest="wallet_path", type=Path, default=Path("~/.bittensor/wallets"), help="wallets folder")
    add("--workers", type=_integer(1, 64), default=4, help="tasks in generation at once")
    add(
        "--generation.endpoint",
        dest="endpoints",
        type=_endpoint,
        nargs="+",
        action="extend",
        metavar="URL",
        help=f"generation services; may be repeated (default: {DEFAULT_ENDPOINT})",
    )
    add("--retries", type=_integer(0, 10), default=2, help="other seeds tried, in time, for a rejected result")
    add(
        "--blacklist",
        type=_blacklist_entry,
        nargs="*",
        metavar="UID|HOTKEY",
        default=list(DEFAULT_BLACKLIST),
        help="validators never asked for tasks",
    )
    add("--blacklist-file", type=Path, default=None, help="more of them, one a line; read again when it changes")
    add("--validation-threshold", type=_fraction, default=0.6, help="lowest score that is submitted, 0 to 1")
    home = f"in {DATA}/NETWORK-NETUID-HOTKEY or in the rehearsal's folder unless named"
    add("--spool", type=Path, help=f"folder of results on their way, of one miner alone; {home}")
    add("--ledger", type=Path, help=f"database of what happened, for scripts.ops.report; {home}")
    add("--metrics-port", type=_integer(0, 65535), default=METRICS_PORT, help="Prometheus on 127.0.0.1; 0: none")
    add(
        "--min-reward",
        type=_fraction,
        default=0.0,
        help="validators whose expected accepted results per GPU second are fewer are skipped; 0 skips none",
    )
    add("--rehearsal.state", dest="rehearsal_state", type=Path, default=REHEARSAL_STATE, help="the rehearsal's folder")
    add("--logging.file", dest="log_file", type=Path, default=Path("logs/miner.log"), help="log, rotated")
    add("--status-file", type=Path, default=None, help="JSON that says when the miner is ready")
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not within {low} to {high}")
        return value

    return integer


def _blacklist_entry(text: str) -> int | str:
    try:
        return parse_entry(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not within 0 to 1")
    return value


def _endpoint(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// or https:// address")
    try:
        parts = urlsplit(text)
        if not parts.hostname or parts.port == 0:
            raise ValueError("no host, or port 0")
    except ValueError as error:  # the text may hold a password
        raise argparse.ArgumentTypeError(f"no address: {error}") from error
    return text
