"""The miner's settings, as flags, variables and `competitive.toml` give them; flags after bittensor's conventions.

Standard library alone: `deploy_competitive.sh` reads them before anything is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from common.checks import FilePath, Many, Number, Whole, Words
from common.log_lines import quoted, shown_network
from common.settings import CommandLine, Given, Score, setting
from neurons.defaults import DATA, NETUID, REHEARSAL, REHEARSAL_HOTKEY, REHEARSAL_STATE, REHEARSAL_WALLET
from neurons.miner.validators.blacklist import parse_entry

# Known to hand out tasks and give no rewards.
DEFAULT_BLACKLIST = (180,)
DEFAULT_ENDPOINT = "http://127.0.0.1:10006"
LEDGER_NAME = "ledger.sqlite"
SPOOL_NAME = "spool"
METRICS_PORT = 10007
NETWORKS = ("auto", REHEARSAL, "finney", "test")
_HOME = f"{DATA}/NETWORK-NETUID-HOTKEY, or the rehearsal's folder"


def _is_network(text: str) -> None:
    if text not in NETWORKS and not text.startswith(("ws://", "wss://")):
        named = "" if "://" in text else f"{quoted(text)} "  # an address may hold a node's key
        raise ValueError(f"{named}is none of {', '.join(NETWORKS)}, ws://..., wss://...")


def _endpoint(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        raise ValueError("is no http:// or https:// address")
    try:
        parts = urlsplit(value)
        if not parts.hostname or parts.port == 0 or re.search(r"\s", value):
            raise ValueError("no host, port 0, or a space")
    except ValueError as error:  # the text may hold a password
        raise ValueError(f"is no address: {error}") from error
    return value


class _AutoOr(Whole):
    """A whole number, or `auto`."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(low, high)
        self.limits = f"auto, or {self.limits}"

    def from_text(self, text: str) -> Any:
        return "auto" if text.strip() == "auto" else super().from_text(text)

    def from_toml(self, value: Any) -> Any:
        return value if value == "auto" else super().from_toml(value)


def _blacklist_entry(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be UIDs and hotkeys")
    return parse_entry(str(value))


@dataclass(frozen=True, kw_only=True)
class NetworkTable:
    """The table [network]."""

    name: str = setting(
        "auto",
        Words(_is_network),
        "network: rehearsal, finney, test, or a chain's ws://... address; auto: finney with a wallet, else rehearsal",
        flags=("--network", "--subtensor.network"),
        metavar="NAME",
        secret=True,
    )
    netuid: int = setting(NETUID, Whole(0, 65535), "number of the subnet", metavar="N")


@dataclass(frozen=True, kw_only=True)
class WalletTable:
    """The table [wallet]: where the keys are. The keys themselves never stand in the file."""

    name: str = setting(
        "", Words(), "wallet (coldkey) name; not used in a rehearsal", flags=("--wallet.name",), metavar="NAME"
    )
    hotkey: str = setting(
        "default", Words(), "hotkey name; not used in a rehearsal", flags=("--wallet.hotkey",), metavar="NAME"
    )
    path: Path = setting(
        Path("~/.bittensor/wallets"), FilePath(), "wallets folder", flags=("--wallet.path",), metavar="PATH"
    )


@dataclass(frozen=True, kw_only=True)
class MinerTable:
    """The table [miner]. `spool` and `ledger` where they are named."""

    workers: int = setting(4, Whole(1, 64), "tasks that are generated at the same time", metavar="N")
    endpoints: tuple[str, ...] = setting(
        (DEFAULT_ENDPOINT,),
        Many(_endpoint, "http:// or https:// addresses", least=1),
        "addresses of generation services; may be repeated",
        flags=("--generation.endpoint",),
        metavar="URL",
        secret=True,
    )
    best_of: int | Literal["auto"] = setting(
        "auto",
        _AutoOr(1, 64),
        "most candidates of a task, of which the best is submitted; auto: as many as idle GPU time allows",
        metavar="N",
    )
    retries: int = setting(
        2,
        Whole(0, 10),
        "further seeds to try for a rejected task when the GPU has other work, while there is time",
        metavar="N",
    )
    blacklist: Collection[int | str] = setting(
        DEFAULT_BLACKLIST,
        Many(_blacklist_entry, "UIDs and hotkeys"),
        "validators that are never asked for tasks",
        metavar="UID|HOTKEY",
    )
    blacklist_file: Path | None = setting(
        None, FilePath(exists=True), "file with more of them, one per line; read again when it changes", metavar="PATH"
    )
    min_reward: float = setting(
        0.0,
        Number(0, 1),
        "skip validators from which fewer accepted results per GPU second are expected; 0 skips none",
        metavar="X",
    )
    metrics_port: int = setting(
        METRICS_PORT, Whole(0, 65535), "port of the Prometheus metrics, on 127.0.0.1; 0: no metrics", metavar="N"
    )
    spool: Path | None = setting(
        None,
        FilePath(),
        "folder of results that validators have not answered yet; not shared between miners",
        default_is=f"in {_HOME}",
        metavar="PATH",
    )
    ledger: Path | None = setting(
        None,
        FilePath(),
        "SQLite database of pulls, generations and submissions, which scripts.ops.report reads",
        default_is=f"in {_HOME}",
        metavar="PATH",
    )
    rehearsal_state: Path = setting(
        REHEARSAL_STATE,
        FilePath(),
        "folder of the rehearsal's wallets, ledger and spool",
        flags=("--rehearsal.state",),
        metavar="PATH",
    )
    log_file: Path = setting(
        Path("logs/miner.log"), FilePath(), "log file, rotated", flags=("--logging.file",), metavar="PATH"
    )
    status_file: Path | None = setting(None, FilePath(), "JSON file that says when the miner is ready", metavar="PATH")


TABLES = {"network": NetworkTable, "wallet": WalletTable, "miner": MinerTable, "score": Score}
COMMAND_LINE = CommandLine("serve_miner_competitive", "Competitive miner for Bittensor subnet 17 (404-GEN).", TABLES)


@dataclass(frozen=True, kw_only=True)
class MinerOptions(MinerTable, Score):
    """What one miner process runs with. `network` is rehearsal, finney, test, or a chain's ws:// address.

    `spool_of` and `ledger_of` say where spool and ledger are, named or not.
    """

    network: str
    wallet_name: str
    wallet_hotkey: str
    wallet_path: Path
    netuid: int = NETUID

    def spool_of(self, hotkey: str) -> Path:
        """Folder of this hotkey's results that are not answered yet."""
        return self.spool or self._home(hotkey) / SPOOL_NAME

    def ledger_of(self, hotkey: str) -> Path:
        """Database of this hotkey's pulls, generations and submissions."""
        return self.ledger or self._home(hotkey) / LEDGER_NAME

    def _home(self, hotkey: str) -> Path:
        """Of this hotkey on this network alone: it has its own cooldowns, and signs its own results."""
        if self.network == REHEARSAL:
            # Apart from real ones: nothing that was practice may look like earnings.
            return self.rehearsal_state
        network = re.sub(r"[^A-Za-z0-9.]+", "-", shown_network(self.network))
        return DATA / f"{network}-{self.netuid}-{hotkey}"


def parse(argv: Sequence[str]) -> MinerOptions:
    """Options from the command line, the environment and the file that it names. Writes the file when asked to.

    Exits with status 2, and a line that names the setting, when they make no sense.
    """
    given = COMMAND_LINE.parse(argv)
    options = resolve(given)
    try:
        if given.asked_to_save:
            given.save()
    except OSError as error:
        sys.exit(f"serve_miner_competitive: --config-file {given.args.config_file}: {error.strerror}")
    return options


def resolve(given: Given) -> MinerOptions:
    """Options from what was given: on which network, and with whose keys. Exits as `parse` does."""
    network, wallet = given["network"], given["wallet"]
    chosen = network.name
    if chosen == "auto":
        chosen = "finney" if wallet.name else REHEARSAL
    if chosen == REHEARSAL:
        # Its own wallet, made without a password: real keys have no business in a practice run.
        name, hotkey, path = REHEARSAL_WALLET, REHEARSAL_HOTKEY, given["miner"].rehearsal_state / "wallets"
    else:
        name, hotkey, path = wallet.name or "default", wallet.hotkey, wallet.path
    try:
        path = path.expanduser()
    except RuntimeError:
        given.refuse("wallet", "path", f"this user has no home folder, so {path} is nowhere")
    return MinerOptions(
        network=chosen,
        netuid=network.netuid,
        wallet_name=name,
        wallet_hotkey=hotkey,
        wallet_path=path,
        **vars(given["miner"]),
        **vars(given["score"]),
    )
