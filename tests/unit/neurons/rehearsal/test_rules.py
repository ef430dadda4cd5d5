"""The rehearsal's own parts: checks, scoring, prompts. That its rules are a validator's: test_validator_contract."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import bittensor as bt
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from common import ply, spz
from generation.web.pictures import decode_image
from neurons.protocol import ImageTask, TextTask, make_submission
from neurons.rehearsal import __main__ as command
from neurons.rehearsal.checks import Unacceptable, check_results, signature_matches
from neurons.rehearsal.network import load_pictures, load_prompts, make_wallet, mixed, shuffled, validator_uids
from neurons.rehearsal.rules import Judgement, Limits, Outcome, Rules
from neurons.rehearsal.scoring import ScoringService

MINER = "5Miner"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rules(clock: Clock) -> Rules:
    return Rules(Limits(), [MINER], (f"prompt {i}" for i in itertools.count()), clock)


def hand_in(rules: Rules, score: float | None) -> Outcome:
    """`score` is None for an empty result."""
    task = rules.pull(MINER).task
    assert task is not None
    assert rules.reason_to_refuse(MINER) is None
    answer = rules.receive(MINER, task.id, lambda _: True, empty=score is None)
    if isinstance(answer, Judgement):
        return answer.outcome
    assert answer == task
    return rules.score(MINER, score).outcome


def test_tasks_are_texts_and_pictures(clock: Clock) -> None:
    rules = Rules(Limits(), [MINER], iter(["a cube", b"PNG"]), clock)
    text = rules.pull(MINER).task
    assert hand_in(rules, 0.9) == "accepted"
    clock.now += 300
    picture = rules.pull(MINER).task
    assert text is not None
    assert (text.type, text.prompt) == ("text", "a cube")
    assert picture is not None
    assert (picture.type, base64.b64decode(picture.prompt)) == ("image", b"PNG")
    # Both survive in the state file.
    rules.restore(rules.saved())
    assert rules.pull(MINER).task == picture
    with pytest.raises(ValueError, match="JSON"):
        rules.restore("no state")


def test_a_miner_that_nobody_has_heard_of_yet(clock: Clock) -> None:
    rules = Rules(Limits(), [MINER], itertools.repeat("p"), clock, known_from=clock.now + 600)
    assert rules.pull(MINER).cooldown_until == clock.now + 3600
    assert rules.reason_to_refuse(MINER) == "unknown hotkey"
    clock.now += 600
    assert rules.pull(MINER).task is not None


def test_compressed_time_divides_every_time_and_nothing_else() -> None:
    limits = Limits().compressed(20)
    assert (limits.task_cooldown, limits.throttle_period, limits.failure_penalty) == (15, 1.5, 30)
    assert (limits.validation_lock, limits.violation_penalty, limits.window) == (1.5, 0.5, 720)
    assert (limits.unregistered_cooldown, limits.state_interval, limits.second) == (180, 30, 0.05)
    assert (limits.violations_allowed, limits.validation_threshold) == (100, 0.6)


def test_compressed_cooldowns_are_announced_in_whole_seconds_and_never_early(clock: Clock) -> None:
    rules = Rules(Limits().compressed(7), [MINER], itertools.repeat("p"), clock)
    hand_in(rules, 0.9)
    until = rules.pull(MINER).cooldown_until
    assert isinstance(until, int)
    clock.now = until
    assert rules.pull(MINER).task is not None


# --- what a submission is checked for

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATOR = bt.Keypair.create_from_uri("//validator").ss58_address
TASK = TextTask(id="1", prompt="a red cube")


def splat(count: int = 7_000, opacity: float = 2.0, invisible: float = 0.0, identity: bool = False) -> bytes:
    names = ply.columns(0)
    table = np.random.default_rng(0).normal(size=(count, len(names))).astype(np.float32)
    table[:, names.index("opacity")] = opacity
    table[: round(count * invisible), names.index("opacity")] = -12
    if identity:
        table[:, -4:] = (1, 0, 0, 0)
    return spz.compress(ply.write(ply.Vertices(names, table)))


@pytest.mark.parametrize("result", [splat(), splat(invisible=0.8)])
def test_good_results_pass(result: bytes) -> None:
    check_results(base64.b64encode(result).decode())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (splat(count=6_999), "6999 Gaussians"),
        (splat(invisible=0.81), "81% of the Gaussians are invisible"),
        (splat(identity=True), "all rotations are identity"),
        (b"", "spz"),
        (b"no zstd", "spz"),
    ],
)
def test_hard_rejections(result: bytes, message: str) -> None:
    with pytest.raises(Unacceptable, match=message):
        check_results(base64.b64encode(result).decode())


def test_what_is_not_base64_is_unacceptable() -> None:
    with pytest.raises(Unacceptable, match="base64"):
        check_results("=not base64")


def test_signatures() -> None:
    submission = make_submission(TASK, b"x", VALIDATOR, KEYPAIR)
    assert signature_matches(submission, TASK, VALIDATOR, KEYPAIR.ss58_address)
    signature = bytearray(base64.b64decode(submission.signature))
    signature[5] ^= 1
    submission.signature = base64.b64encode(signature).decode()
    assert not signature_matches(submission, TASK, VALIDATOR, KEYPAIR.ss58_address)
    for nonsense, message in (("", "signature"), ("=?=?", "padding"), ("YWJj", "signature")):
        submission.signature = nonsense
        with pytest.raises(ValueError, match=message):
            signature_matches(submission, TASK, VALIDATOR, KEYPAIR.ss58_address)


# --- the service that scores


@pytest.mark.parametrize(
    ("status", "body", "score"),
    [
        (200, {"score": 0.7}, 0.7),
        (200, {"score": 0}, 0.0),
        (200, {"score": None}, None),
        (200, {"score": float("nan")}, None),
        (200, [], None),
        (422, {"score": 0.7}, None),
        (500, {"score": 0.7}, None),
    ],
)
@pytest.mark.parametrize("task", [TASK, ImageTask(id="2", prompt="UE5H")])
async def test_scores(task: TextTask | ImageTask, status: int, body: object, score: float | None) -> None:
    asked: list[tuple[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.path, await request.json()))
        return web.Response(text=json.dumps(body), status=status, content_type="application/json")

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/{path:.*}", answer)
    async with TestServer(app) as server:
        results = base64.b64encode(splat()).decode()
        assert await ScoringService(str(server.make_url(""))).score(task, results) == score
        assert await ScoringService(str(server.make_url(""))).score(task, "unreadable") == 0.0
    ((path, sent),) = asked
    kind, field = ("txt", "prompt") if task.type == "text" else ("img", "prompt_image")
    assert (path, sent[field], sent["data"]) == (f"/validate_{kind}_to_3d_ply/", task.prompt, results)


async def test_no_connection_is_no_score() -> None:
    results = base64.b64encode(splat()).decode()
    assert await ScoringService("http://127.0.0.1:9").score(TASK, results) is None


# --- the network around them


def test_uids_and_prompts() -> None:
    assert validator_uids(4) == [1, 2, 3, 180]
    assert validator_uids(1) == [1]
    prompts = load_prompts()
    assert len(prompts) >= 50
    assert all(1 <= len(prompt) <= 1024 for prompt in prompts)
    order = list(itertools.islice(shuffled(prompts, 1), len(prompts)))
    assert sorted(order) == sorted(prompts)
    assert order != list(itertools.islice(shuffled(prompts, 2), len(prompts)))


def test_a_fifth_of_the_tasks_are_pictures() -> None:
    pictures = load_pictures()
    assert len(pictures) >= 8
    for picture in pictures:
        assert len(picture) < 32_000
        decode_image(picture, "picture")
    drawn = list(itertools.islice(mixed(["a"], pictures, 1), 2000))
    assert 0.17 < sum(isinstance(prompt, bytes) for prompt in drawn) / len(drawn) < 0.23
    assert set(drawn) == {"a", *pictures}
    assert set(itertools.islice(mixed(["a"], [], 1), 100)) == {"a"}


def test_a_prompt_file_without_prompts_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        load_prompts(tmp_path / "empty.txt")


def test_wallets_are_made_once_and_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = make_wallet(tmp_path, "miner").hotkey.ss58_address
    assert make_wallet(tmp_path, "miner").hotkey.ss58_address == first
    assert make_wallet(tmp_path, "validator_1").hotkey.ss58_address != first
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    keyfile = tmp_path / "rehearsal" / "hotkeys" / "miner"
    assert keyfile.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "argv", [["--validators", "0"], ["--validators", "65"], ["--time-scale", "nan"], ["--tim", "2"]]
)
def test_bad_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.parse(argv)
    assert stop.value.code == 2
