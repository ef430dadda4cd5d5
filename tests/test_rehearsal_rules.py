"""The rehearsal's rules and checks, without network: a fake clock and splats made in place."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import bittensor as bt
import numpy as np
import pytest

from neurons import ply, spz
from neurons.protocol import SubmitResults, TextTask, make_submission
from neurons.rehearsal import __main__ as command
from neurons.rehearsal.checks import Unacceptable, check_submission
from neurons.rehearsal.network import load_prompts, make_wallet, shuffled, validator_uids
from neurons.rehearsal.rules import DUEL_RATING, Limits, Rules

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


def hand_in(rules: Rules, score: float | None) -> bool:
    task = rules.pull(MINER).task
    assert task is not None
    assert rules.reason_to_refuse(MINER) is None
    assert rules.begin_validation(MINER, task.id) == task
    return rules.finish_validation(MINER, score)


def test_the_same_task_until_it_is_handed_in(rules: Rules, clock: Clock) -> None:
    first = rules.pull(MINER)
    clock.now += 5_000
    assert rules.pull(MINER) == first
    assert hand_in(rules, 0.9)
    clock.now += 300
    second = rules.pull(MINER).task
    assert second is not None and first.task is not None
    assert second.id != first.task.id and second.prompt == "prompt 1"


@pytest.mark.parametrize(
    ("held", "score", "cooldown"),
    [
        (0, 0.9, 300),  # assignment + task_cooldown
        (20, 0.9, 280),
        (30, 0.9, 270),  # from here on now + task_cooldown - throttle_period
        (200, 0.9, 270),
        (200, 0.6, 270),  # the threshold itself is accepted
        (200, None, 270),  # empty
        (0, None, 300),
        (200, 0.59, 870),
        (0, 0.0, 900),
    ],
)
def test_cooldown_after_a_submission(
    rules: Rules, clock: Clock, held: float, score: float | None, cooldown: float
) -> None:
    rules.pull(MINER)
    clock.now += held
    hand_in(rules, score)
    assert rules.cooldown_until(MINER) == clock.now + cooldown
    clock.now += cooldown - 0.5
    assert rules.pull(MINER).task is None
    clock.now += 0.5
    assert rules.pull(MINER).task is not None


def test_violations_cost_from_the_hundred_and_first_on(rules: Rules, clock: Clock) -> None:
    hand_in(rules, 0.9)
    until = rules.cooldown_until(MINER)
    for count in range(1, 101):
        answer = rules.pull(MINER)
        assert (answer.violations, answer.cooldown_until, answer.task) == (count, until, None)
    assert rules.pull(MINER).cooldown_until == until + 10
    assert rules.pull(MINER).cooldown_until == until + 20
    clock.now = until + 20
    hand_in(rules, 0.9)
    assert rules.miners[MINER].violations == 101
    clock.now += 300
    hand_in(rules, 0.1)
    assert rules.miners[MINER].violations == 101  # only a good submission takes one off


def test_resubmissions_get_feedback_and_nothing_else(rules: Rules, clock: Clock) -> None:
    task = rules.pull(MINER).task
    assert task is not None
    assert rules.begin_validation(MINER, task.id) is not None
    assert rules.begin_validation(MINER, task.id) is None  # while validating
    rules.finish_validation(MINER, 0.8)
    until = rules.cooldown_until(MINER)
    clock.now += 29
    assert rules.reason_to_refuse(MINER) is None
    assert rules.begin_validation(MINER, task.id) is None
    assert rules.cooldown_until(MINER) == until
    assert rules.feedback(MINER).generations_within_the_window == 1
    clock.now += 2
    assert rules.reason_to_refuse(MINER) == "no task assigned"


def test_who_may_submit(rules: Rules) -> None:
    assert rules.reason_to_refuse("5Other") == "unknown hotkey"
    assert rules.reason_to_refuse(MINER) == "no task assigned"
    rules.pull(MINER)
    assert rules.reason_to_refuse(MINER) is None
    assert rules.begin_validation(MINER, "another task") is None


def test_an_unregistered_miner_waits_an_hour(rules: Rules, clock: Clock) -> None:
    answer = rules.pull("5Other")
    assert (answer.task, answer.cooldown_until) == (None, clock.now + 3600)


def test_a_validator_that_can_not_score_leaves_the_task(rules: Rules) -> None:
    task = rules.pull(MINER).task
    assert task is not None
    rules.begin_validation(MINER, task.id)
    rules.abandon_validation(MINER)
    assert rules.begin_validation(MINER, task.id) == task


def test_feedback_covers_four_hours(rules: Rules, clock: Clock) -> None:
    hand_in(rules, 0.6)
    clock.now += 4 * 3600 - 400
    hand_in(rules, 0.8)
    feedback = rules.feedback(MINER)
    assert feedback.task_fidelity_score == 0.8
    assert feedback.average_fidelity_score == pytest.approx(0.7)
    assert feedback.generations_within_the_window == 2
    assert feedback.current_miner_reward == 2 * DUEL_RATING
    clock.now += 400
    hand_in(rules, 0.3)
    feedback = rules.feedback(MINER, validation_failed=True)
    assert (feedback.generations_within_the_window, feedback.average_fidelity_score) == (1, 0.8)
    assert (feedback.validation_failed, feedback.task_fidelity_score) == (True, 0.3)


def test_compressed_time_divides_every_time_and_nothing_else() -> None:
    limits = Limits().compressed(20)
    assert (limits.task_cooldown, limits.throttle_period, limits.failure_penalty) == (15, 1.5, 30)
    assert (limits.validation_lock, limits.violation_penalty, limits.window) == (1.5, 0.5, 720)
    assert limits.unregistered_cooldown == 180
    assert (limits.violations_allowed, limits.validation_threshold) == (100, 0.6)


def test_announced_cooldowns_are_whole_seconds_and_never_early(clock: Clock) -> None:
    rules = Rules(Limits().compressed(7), [MINER], itertools.repeat("p"), clock)
    hand_in(rules, 0.9)
    clock.now = rules.cooldown_until(MINER)
    assert isinstance(rules.cooldown_until(MINER), int)
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


def check(submission: SubmitResults) -> None:
    check_submission(submission, TASK, VALIDATOR, KEYPAIR.ss58_address)


@pytest.mark.parametrize("result", [splat(), splat(invisible=0.8)])
def test_good_submissions_pass(result: bytes) -> None:
    check(make_submission(TASK, result, VALIDATOR, KEYPAIR))


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
        check(make_submission(TASK, result, VALIDATOR, KEYPAIR))


def test_a_tampered_signature_is_unacceptable() -> None:
    submission = make_submission(TASK, splat(), VALIDATOR, KEYPAIR)
    signature = bytearray(base64.b64decode(submission.signature))
    signature[5] ^= 1
    submission.signature = base64.b64encode(signature).decode()
    with pytest.raises(Unacceptable, match="signature"):
        check(submission)


@pytest.mark.parametrize(("field", "value"), [("compression", 1), ("data_format", "obj"), ("results", "=not base64")])
def test_other_encodings_are_unacceptable(field: str, value: object) -> None:
    submission = make_submission(TASK, splat(), VALIDATOR, KEYPAIR)
    setattr(submission, field, value)
    with pytest.raises(Unacceptable):
        check(submission)


# --- the network around them


def test_uids_and_prompts() -> None:
    assert validator_uids(4) == [1, 2, 3, 180]
    assert validator_uids(1) == [1]
    prompts = load_prompts()
    assert len(prompts) >= 50
    assert all(1 <= len(prompt) <= 1024 for prompt in prompts)
    order = list(itertools.islice(shuffled(prompts, 1), len(prompts)))
    assert sorted(order) == sorted(prompts) and order != list(itertools.islice(shuffled(prompts, 2), len(prompts)))


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
