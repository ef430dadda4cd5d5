"""What keeps the miner going for weeks: supervisor, blacklist, synchronisation, spool, books."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from neurons import chain
from neurons.chain import Metagraph, MetagraphUnavailable, Neuron
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Pull, Submission
from neurons.miner.submission import spool as spools
from neurons.miner.submission.spool import Spool, SpooledResult
from neurons.miner.supervisor import MAX_RESTART_S, keep_running
from neurons.miner.validators.blacklist import MAX_FILE_BYTES, Blacklist, BlacklistUnreadable, parse_entry
from neurons.miner.validators.clock import steady_time
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory
from neurons.miner.validators.sync import Synchroniser
from neurons.protocol import TextTask
from scripts.bench import virtual_time
from scripts.bench.virtual_time import now

HOTKEY = "5" + "F" * 47
VALIDATOR = Neuron(uid=5, hotkey=HOTKEY, ip="127.0.0.1", port=8091, stake=5000.0, serving=True)
MINER = Neuron(uid=9, hotkey="5M", ip="0.0.0.0", port=0, stake=0.0, serving=False)


# --- the supervisor


def test_a_part_that_breaks_starts_again_later_and_later(caplog: pytest.LogCaptureFixture) -> None:
    starts: list[float] = []

    async def part() -> None:
        starts.append(now())
        if len(starts) < 10:
            raise RuntimeError("broken on purpose")

    virtual_time.run(keep_running("The part", part))
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    records = [record for record in caplog.records if "The part broke" in record.getMessage()]
    assert len(records) == 9
    assert all(record.exc_info for record in records)


def test_a_part_that_ran_well_for_long_starts_again_soon() -> None:
    starts: list[float] = []

    async def part() -> None:
        starts.append(now())
        if len(starts) == 3:
            return
        await asyncio.sleep(2 * MAX_RESTART_S)
        raise RuntimeError("broken on purpose")

    virtual_time.run(keep_running("The part", part))
    assert [later - earlier for earlier, later in itertools.pairwise(starts)] == [121, 121]


async def test_a_part_that_is_cancelled_is_not_started_again() -> None:
    running = asyncio.create_task(keep_running("The part", lambda: asyncio.sleep(3600)))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_a_part_that_meets_a_cancelled_future_starts_again() -> None:
    starts: list[float] = []

    async def part() -> None:
        starts.append(now())
        if len(starts) == 1:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    virtual_time.run(keep_running("The part", part))
    assert len(starts) == 2


# --- the blacklist


@pytest.mark.parametrize(("text", "entry"), [("0", 0), ("180", 180), (HOTKEY, HOTKEY)])
def test_entries(text: str, entry: int | str) -> None:
    assert parse_entry(text) == entry


@pytest.mark.parametrize("text", ["", "-1", "65536", "٣", "5F", HOTKEY + "!", "0x10", "9" * 5000])
def test_what_is_no_entry(text: str) -> None:
    with pytest.raises(ValueError, match="neither a UID"):
        parse_entry(text)


def test_the_file_is_read_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "blacklist"
    blacklist = Blacklist([180], file)
    file.touch()
    blacklist.load()
    assert 180 in blacklist
    assert 7 not in blacklist
    file.write_text(f"# those who pay nothing\n7\n\n{HOTKEY} # why\nnonsense \x1b[2J\n")
    assert blacklist.reload()
    assert 7 in blacklist
    assert HOTKEY in blacklist
    assert 180 in blacklist
    assert "line 5: 'nonsense \\x1b[2J' is neither" in caplog.text
    assert not blacklist.reload()
    file.write_text("8\n")
    os.utime(file, (1, 1))
    assert blacklist.reload()
    assert 7 not in blacklist
    assert 8 in blacklist


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_files_of_other_editors(tmp_path: Path, encoding: str, line_end: str) -> None:
    file = tmp_path / "blacklist"
    file.write_bytes(line_end.join(["42", HOTKEY, "7 # größte", ""]).encode(encoding))
    blacklist = Blacklist([], file)
    blacklist.load()
    assert all(entry in blacklist for entry in (42, 7, HOTKEY))


def test_a_mark_in_the_middle_is_of_a_file_that_was_appended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "blacklist"
    file.write_bytes(b"\xef\xbb\xbf42\r\n" + b"\xef\xbb\xbf43\r\n")
    blacklist = Blacklist([], file)
    blacklist.load()
    assert 42 in blacklist
    assert 43 in blacklist
    assert not caplog.records


# Not there, no text, a part of a text in UTF-16, UTF-16 without its mark, and far too long.
UNREADABLE = [None, b"\xff7\n", "7\n".encode("utf-16")[:-1], "7\n".encode("utf-16-le"), b"7\n" * MAX_FILE_BYTES]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_breaks_or_vanishes_leaves_what_it_said(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "blacklist"
    file.write_text("7")
    blacklist = Blacklist([], file)
    blacklist.load()
    caplog.clear()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    for _ in range(3):
        assert not blacklist.reload()
    assert 7 in blacklist
    (line,) = [record.getMessage() for record in caplog.records]  # said once
    assert line.startswith(f"Blacklist {file}: ")
    assert line.endswith("; the 1 entries of before stay in force")
    file.write_text("7\n8")
    assert blacklist.reload()
    assert 8 in blacklist


@pytest.mark.parametrize("content", UNREADABLE)
def test_at_the_start_a_file_that_can_not_be_read_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "blacklist"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BlacklistUnreadable, match=f"^Blacklist {file}: "):
        Blacklist([], file).load()


def test_a_folder_is_no_blacklist(tmp_path: Path) -> None:
    with pytest.raises(BlacklistUnreadable, match="not a file"):
        Blacklist([], tmp_path).load()


def test_by_uid_and_by_hotkey(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for entry, reason in ((5, "blacklisted UID"), (HOTKEY, "blacklisted hotkey")):
        directory = ValidatorDirectory(Eligibility("5M", "rehearsal", Blacklist([entry])))
        directory.update(Metagraph(17, (VALIDATOR,)))
        assert not directory.eligible
        assert f"Validator [5] skipped: {reason}" in caplog.text


# --- following the chain


class Manager:
    def __init__(self) -> None:
        self.syncs = 0

    def sync(self) -> None:
        self.syncs += 1


def synchroniser(
    fetch: Callable[[], Awaitable[Metagraph]], blacklist: Blacklist | None = None
) -> tuple[Synchroniser, ValidatorDirectory, Manager]:
    blacklist = blacklist or Blacklist([])
    directory, manager = ValidatorDirectory(Eligibility("5M", "rehearsal", blacklist)), Manager()
    parts = "5M", "rehearsal", directory, manager, blacklist
    return Synchroniser(fetch, *parts, interval=300.0), directory, manager  # type: ignore[arg-type]


async def stopped_after(seconds: float, running: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await running
    except TimeoutError:
        pass


def test_no_network_is_waited_out_with_what_was_known() -> None:
    asked: list[float] = []
    gone = False

    async def fetch() -> Metagraph:
        asked.append(now())
        if gone:
            raise MetagraphUnavailable("finney: ConnectionRefusedError")
        return Metagraph(17, (VALIDATOR, MINER))

    async def main() -> None:
        nonlocal gone
        following, directory, manager = synchroniser(fetch)
        assert "reading the metagraph" in following.problem
        await stopped_after(700, following.follow_chain())
        assert [later - asked[0] for later in asked] == [0, 300, 600]
        assert following.problem == ""
        assert manager.syncs == 3
        gone = True
        asked.clear()
        await stopped_after(1000, following.follow_chain())
        assert [later - asked[0] for later in asked] == [0, 2, 6, 14, 30, 62, 126, 254, 510, 810]
        assert following.problem == "No metagraph: finney: ConnectionRefusedError"
        assert HOTKEY in directory.eligible
        assert manager.syncs == 3

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("neurons", "problem"),
    [
        ((VALIDATOR,), "Not registered: hotkey 5M is not on subnet 17 of rehearsal"),
        ((MINER, replace(VALIDATOR, stake=1.0)), "No available validators: none of the subnet's neurons is eligible"),
        ((MINER, VALIDATOR), ""),
    ],
)
def test_what_stands_in_the_way_is_said(
    neurons: tuple[Neuron, ...], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fetch() -> Metagraph:
        return Metagraph(17, neurons)

    async def main() -> None:
        following, directory, _ = synchroniser(fetch)
        await stopped_after(1, following.follow_chain())
        assert following.problem == problem
        assert bool(directory.eligible) == (not problem)
        assert problem in caplog.text

    virtual_time.run(main())


def test_what_the_chain_has_of_the_miner_is_told_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    asked = iter([None, 0.0, 0.0, 0.0125])

    async def fetch() -> Metagraph:
        return Metagraph(17, (VALIDATOR, replace(MINER, uid=42, incentive=next(asked))))

    async def main() -> None:
        following, _, _ = synchroniser(fetch)
        await stopped_after(1000, following.follow_chain())

    caplog.set_level("INFO")
    virtual_time.run(main())
    assert [line for line in caplog.messages if line.startswith("Registered")] == [
        "Registered on subnet 17 as UID 42",
        "Registered on subnet 17 as UID 42, incentive 0.00000 (its share of what all miners earn)",
        "Registered on subnet 17 as UID 42, incentive 0.01250 (its share of what all miners earn)",
    ]


def test_a_change_of_the_blacklist_s_file_is_applied(tmp_path: Path) -> None:
    async def fetch() -> Metagraph:
        return Metagraph(17, (VALIDATOR, MINER))

    async def main() -> None:
        file = tmp_path / "blacklist"
        following, directory, manager = synchroniser(fetch, Blacklist([], file))
        await stopped_after(1, following.follow_chain())
        assert HOTKEY in directory.eligible
        watching = asyncio.create_task(following.follow_blacklist())
        await asyncio.sleep(5)
        file.write_text(HOTKEY)
        await asyncio.sleep(5)
        assert not directory.eligible
        assert manager.syncs == 2
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    virtual_time.run(main())


async def test_a_metagraph_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def decode(network: str, netuid: int) -> Metagraph:
        time.sleep(0.5)  # noqa: ASYNC251 - as decoding does, which waits for nothing
        return Metagraph(netuid, (VALIDATOR,))

    monkeypatch.setattr(chain, "_fetch", decode)
    fetching = asyncio.create_task(chain.fetch("finney", 17))
    longest = 0.0
    while not fetching.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - before)
    assert (await fetching).neurons == (VALIDATOR,)
    assert longest < 0.4


async def test_a_reader_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    async def swallows(network: str, netuid: int) -> Metagraph:
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        raise MetagraphUnavailable("too late")

    monkeypatch.setattr(chain, "_fetch", swallows)
    monkeypatch.setattr(chain, "FETCH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(chain, "GIVE_UP_S", 0.1, raising=False)
    try:
        async with asyncio.timeout(5):
            with pytest.raises(MetagraphUnavailable, match="finney: reading subnet 17 has not ended"):
                await chain.fetch("finney", 17)
    finally:
        over.set()
    await asyncio.sleep(0.1)  # what it delivers now is for nobody


# --- the spool's limits


def put(spool: Spool, name: str, size: int = 1) -> None:
    spool.put(SpooledResult("5V", TextTask(id=name, prompt="p"), bytes(size)))


def names(spool: Spool) -> list[str]:
    return [task_id for _, task_id in spool.entries()]


def test_the_spool_is_bounded_in_number_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MAX_ENTRIES", 3)
    monkeypatch.setattr(spools, "MAX_BYTES", 10_000)
    spool = Spool(tmp_path)
    for number in range(5):
        put(spool, str(number))
        assert len(list(tmp_path.glob("*.result"))) <= 3
        for path in tmp_path.glob("*.result"):  # each one a second older than the next
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1))
    assert names(spool) == ["2", "3", "4"]
    put(spool, "large", 9_800)
    assert names(spool) == ["4", "large"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000


def test_a_result_that_can_not_be_deleted_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    put(spool, "1")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        spool.remove("5V", "1")
    assert "can not be removed" in caplog.text
    assert spool.get("5V", TextTask(id="1", prompt="p")) is None
    put(spool, "1")  # given out and made again
    assert spool.get("5V", TextTask(id="1", prompt="p")) is not None


# --- books


async def test_cooldowns_outlast_a_restart(tmp_path: Path) -> None:
    other = replace(VALIDATOR, uid=6, hotkey="5W")
    third = replace(VALIDATOR, uid=7, hotkey="5X")
    books = Bookkeeping(tmp_path / "ledger.sqlite", 0, 0.0)
    assert await books.cooldowns() == {}
    books.start()
    now = steady_time()
    books.record(Submission(VALIDATOR, "1", "accepted", 1.0, ask_again_at=now + 100))
    books.record(Pull(other, "cooldown", 0.1, ask_again_at=now + 200))
    books.record(Pull(other, "task", 0.1, "2"))  # held when the miner was killed: to be pulled at once
    books.record(Submission(third, "3", "accepted", 1.0, ask_again_at=now - 1))
    assert books.totals == {"submission accepted": 2, "pull cooldown": 1, "pull task": 1}
    await books.close()
    later = Bookkeeping(tmp_path / "ledger.sqlite", 0, 0.0)
    assert await later.cooldowns() == {HOTKEY: pytest.approx(now + 100, abs=1)}
