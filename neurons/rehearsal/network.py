"""A small subnet on this machine: wallets, validators, and the file that tells the miner where they are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import bittensor as bt

from neurons import chain
from neurons.chain import Metagraph, Neuron
from neurons.defaults import NETUID, REHEARSAL_HOTKEY, REHEARSAL_WALLET
from neurons.rehearsal.hostile import HostileValidator
from neurons.rehearsal.rules import Limits, Rules
from neurons.rehearsal.scoring import ScoringService
from neurons.rehearsal.troubles import NONE, TROUBLES
from neurons.rehearsal.truth import TruthFile
from neurons.rehearsal.validator import RehearsalValidator

PROMPTS = Path(__file__).with_name("prompts.txt")
PICTURES = Path(__file__).with_name("pictures")
# Of the synthetic tasks.
PICTURE_SHARE = 0.2
UNREWARDING_UID = 180
MINER_UID = 200
FIRST_HOSTILE_UID = 100
VALIDATOR_STAKE = 10_000.0
START_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class RehearsalNetwork:
    """`validators` axons and a validator of each of the `hostile` kinds, be it one that misbehaves or one that is only
    troublesome, all in one thread with one event loop. To be used as a context manager.

    A share of the tasks are `pictures` (PNG), if there are any. `truth` is the file for what the validators did.
    """

    def __init__(
        self,
        state: Path,
        endpoint: str,
        validators: int,
        limits: Limits,
        prompts: list[str],
        hostile: Sequence[str] = (),
        pictures: Sequence[bytes] = (),
        truth: Path | None = None,
    ) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._file = state / "network.json"
        self._written = b""
        # Gone until the validators listen: a miner must not find the ports of an earlier run.
        self._file.unlink(missing_ok=True)
        wallets = state / "wallets"
        self.miner_hotkey: str = make_wallet(wallets, REHEARSAL_HOTKEY).hotkey.ss58_address
        scoring = ScoringService(endpoint)
        self._truth = None if truth is None else TruthFile(truth)

        def make(uid: int, name: str, kind: str = "") -> RehearsalValidator:
            known_from = time.time() + TROUBLES.get(kind, NONE).unknown_seconds * limits.second
            return RehearsalValidator(
                uid,
                make_wallet(wallets, name),
                Rules(limits, [self.miner_hotkey], mixed(prompts, pictures, uid), known_from=known_from),
                scoring,
                kind,
                state / "validators" / f"{name}.json",
                self._truth,
            )

        kinds = list(enumerate(hostile, FIRST_HOSTILE_UID))
        self.validators = [make(uid, f"validator_{uid}") for uid in validator_uids(validators)]
        self.troublesome = [make(uid, f"hostile_{uid}", kind) for uid, kind in kinds if kind in TROUBLES]
        self.hostile = [
            HostileValidator(uid, make_wallet(wallets, f"hostile_{uid}").hotkey.ss58_address, kind, limits)
            for uid, kind in kinds
            if kind not in TROUBLES
        ]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="rehearsal", daemon=True)

    def __enter__(self) -> RehearsalNetwork:
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(validator.started for validator in self._all()):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the validators did not start")
            time.sleep(0.01)
        self._write()
        for validator in self._all():
            log.info(
                "Validator [%d] %s listens on 127.0.0.1:%d",
                validator.uid,
                validator.kind or validator.hotkey,
                validator.port,
            )
        return self

    def announce(self) -> None:
        """Tells miners of these validators, unless another rehearsal in this folder has told them of its own.

        To be called every now and then: that one ends, and takes back what it told.
        """
        if not self._file.exists():
            self._write()

    def _write(self) -> None:
        chain.save(self._metagraph(), self._file)
        self._written = self._file.read_bytes()

    def __exit__(self, *_: object) -> None:
        if self._file.exists() and self._file.read_bytes() == self._written:
            self._file.unlink()
        for validator in self._all():
            validator.stop()
        self._thread.join(timeout=10)
        if self._truth is not None:
            self._truth.close()

    async def _serve(self) -> None:
        await asyncio.gather(*(validator.serve() for validator in self._all()))

    def _all(self) -> list[RehearsalValidator | HostileValidator]:
        return [*self.validators, *self.troublesome, *self.hostile]

    def _metagraph(self) -> Metagraph:
        neurons = [
            Neuron(validator.uid, validator.hotkey, "127.0.0.1", validator.port, VALIDATOR_STAKE, serving=True)
            for validator in self._all()
        ]
        miner = Neuron(MINER_UID, self.miner_hotkey, "0.0.0.0", 0, 0.0, serving=False)
        return Metagraph(NETUID, (*neurons, miner))


def validator_uids(count: int) -> list[int]:
    """1, 2, ... and, from two validators on, UID 180 as the last one."""
    return [*range(1, count), UNREWARDING_UID] if count > 1 else [1]


def make_wallet(folder: Path, hotkey: str) -> bt.Wallet:
    """The rehearsal's wallet with this hotkey, made without a password when it is not there yet."""
    wallet = bt.Wallet(REHEARSAL_WALLET, hotkey, str(folder))
    if not wallet.hotkey_file.exists_on_device():
        # Suppressed, because it would print the mnemonic.
        with contextlib.redirect_stdout(None):
            wallet.create_new_hotkey(use_password=False, overwrite=False, suppress=True)
    return wallet


def load_prompts(path: Path = PROMPTS) -> list[str]:
    """One prompt a line; empty lines and those that start with # do not count. Raises ValueError when none is left."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def load_pictures(folder: Path = PICTURES) -> list[bytes]:
    """PNG files, made by `scripts.tiny_pack.rehearsal_pictures`."""
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def mixed(prompts: list[str], pictures: Sequence[bytes], seed: int) -> Iterator[str | bytes]:
    """Texts and, for a fifth, pictures for ever, in an order of the seed's own."""
    texts, drawn = shuffled(prompts, seed), random.Random(seed)
    while True:
        is_picture = bool(pictures) and drawn.random() < PICTURE_SHARE
        yield drawn.choice(pictures) if is_picture else next(texts)


def shuffled(prompts: list[str], seed: int) -> Iterator[str]:
    """The prompts for ever, in an order of the seed's own."""
    return itertools.cycle(random.Random(seed).sample(prompts, len(prompts)))
