"""The download script as users run it, against a hub on loopback."""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from generation.schema.options import ModelChoice
from generation.weights import MissingWeights, WeightsError, download, loading
from generation.weights.registry import REGISTRY, Entry, lookup
from tests.support.downloads import BIREFNET, CHUNK, MVDREAM, OTHER, RMBG, WEIGHTS, birefnet, blob, run, start
from tests.support.fake_hub import ENDLESS, Hub, digest


def test_fetches_what_is_used_and_shows_progress(hub, cache):
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert "licence: MIT" in done.stdout
    assert "[4/4] model.safetensors, 0.2 MB" in done.stdout
    assert "100%" in done.stderr
    folder = loading.local_folder(BIREFNET)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not (folder / "pytorch_model.bin").exists()  # the same weights, as a pickle


def test_a_second_run_fetches_nothing(hub, cache):
    run(hub, cache, "--only", "birefnet")
    hub.requests.clear()
    again = run(hub, cache, "--only", "birefnet")
    assert again.returncode == 0
    assert "0.00 GB to fetch" in again.stdout
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.slow
def test_goes_on_after_a_cut_connection(hub, cache, large):
    hub.repositories[BIREFNET.repo].cut_after["model.safetensors"] = [CHUNK + 1]
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert hub.fetched("model.safetensors") == ["", f"bytes={CHUNK}-"]
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


def test_goes_on_after_a_reset(hub, cache, large):
    hub.repositories[BIREFNET.repo].reset_after["model.safetensors"] = [CHUNK + 1, 0]
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on in 0 s") == 2
    assert "reset by peer" in done.stdout
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


def test_a_small_file_is_asked_for_again(hub, cache):
    hub.repositories[BIREFNET.repo].reset_after["config.json"] = [1] * (download.PATIENCE - 1)
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on in 0 s") == download.PATIENCE - 1
    assert blob(cache, BIREFNET, "config.json").read_bytes() == b"{}"


def test_a_small_file_that_never_comes_is_named(hub, cache):
    hub.repositories[BIREFNET.repo].reset_after["config.json"] = [1] * download.PATIENCE
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 1
    assert "birefnet: config.json did not arrive" in done.stderr
    assert "run this again" in done.stderr
    assert len(hub.fetched("config.json")) == download.PATIENCE


@pytest.mark.slow
def test_goes_on_by_a_new_address_when_the_old_one_has_expired(hub, cache, large):
    repository = hub.repositories[BIREFNET.repo]
    repository.signed, repository.cut_after["model.safetensors"] = True, [CHUNK + 1]
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert f"cut off at {CHUNK / 1e6:.1f} MB (HTTP 403 from 127.0.0.1); going on in 0 s" in done.stdout
    assert hub.fetched("model.safetensors") == ["", f"bytes={CHUNK}-", f"bytes={CHUNK}-"]
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


class TestPatience:
    """A large file in rounds, each of which brings so many bytes and then fails."""

    SIZE = 2000

    @pytest.fixture
    def rounds(self, cache, monkeypatch):
        """Runs one download; takes what it needs of the rounds."""
        file = download._File("model.safetensors", self.SIZE, digest(b"0" * self.SIZE), True)

        def fetch(script: list[tuple[int, Exception | None]]) -> None:
            def http_get(location, target, **options):
                count, error = script.pop(0)
                target.write(b"0" * count)
                if error:
                    raise error

            monkeypatch.setattr(download, "http_get", http_get)
            download.fetch(download.Plan(BIREFNET, "a" * 40, (file,)), lambda text: None)

        monkeypatch.setattr(download, "PAUSE", 0)
        monkeypatch.setattr(download, "get_hf_file_metadata", lambda url: SimpleNamespace(location=url))
        return fetch

    def test_lasts_while_there_is_growth(self, rounds):
        reset, still = ConnectionResetError(errno.ECONNRESET, "reset"), (0, HTTPError("reset"))
        script = [*[still] * 4, (1, reset), *[still] * 4, (1, reset), (self.SIZE - 2, None)]
        rounds(script)
        assert not script

    def test_ends_when_nothing_comes(self, rounds):
        script = [(1, HTTPError("reset")), *[(0, HTTPError("reset"))] * 9]
        with pytest.raises(WeightsError, match=r"birefnet: model\.safetensors .*: reset, 5 times in a row.*run this"):
            rounds(script)
        assert len(script) == 4

    def test_a_full_disk_is_said_at_once(self, rounds):
        script = [(0, OSError(errno.ENOSPC, "No space left on device"))] * 9
        with pytest.raises(WeightsError, match=r"model\.safetensors .*No space left"):
            rounds(script)
        assert len(script) == 8

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_what_the_hub_refuses_is_said_at_once(self, rounds, monkeypatch, status):
        asked = []

        def refuse(url: str) -> None:
            asked.append(url)
            answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
            raise HfHubHTTPError("not for\nyou", response=answer)

        monkeypatch.setattr(download, "get_hf_file_metadata", refuse)
        with pytest.raises(WeightsError, match=r"birefnet: model\.safetensors did not arrive: not for you; run this"):
            rounds([])
        assert len(asked) == 1


def wait_for_a_chunk(cache: Path, download: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size == CHUNK for part in (cache / "hub").rglob("*.partial")):
        assert time.monotonic() < deadline
        assert download.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_goes_on_in_the_next_run(hub, cache, large):
    hub.repositories[BIREFNET.repo].stall_after["model.safetensors"] = CHUNK + 1
    with start(hub, cache, "--only", "birefnet") as stopped:
        wait_for_a_chunk(cache, stopped)
        stopped.send_signal(signal.SIGINT)
        _, problems = stopped.communicate(timeout=30)
    assert stopped.returncode == 1
    assert "stopped; run this again to go on" in problems
    hub.repositories[BIREFNET.repo].stall_after.clear()
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 0, done.stderr
    assert f"{CHUNK / 1e6:.1f} MB of it are here already" in done.stdout
    assert hub.fetched("model.safetensors") == ["", f"bytes={CHUNK}-"]
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


@pytest.mark.slow
def test_a_second_download_at_the_same_time_leaves_the_first_alone(hub, cache, large):
    stalled = hub.repositories[BIREFNET.repo].stall_after
    stalled["model.safetensors"] = CHUNK + 1
    with start(hub, cache, "--only", "birefnet") as first:
        wait_for_a_chunk(cache, first)
        stalled.clear()
        second = run(hub, cache, "--only", "birefnet", "--only", "mvdream-sd2.1")
        assert second.returncode == 1
        assert "another download of birefnet is at work in" in second.stderr
        assert "wait for it" in second.stderr
        assert loading.local_folder(MVDREAM)  # the other one, which nobody is at
        hub.go_on.set()
        _, problems = first.communicate(timeout=30)
    assert first.returncode == 0, problems
    assert hub.fetched(f"{BIREFNET.revision}/model.safetensors") == ["", f"bytes={CHUNK}-"]
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


def test_gated_says_where_to_accept_which_licence(hub, cache):
    hub.repositories[RMBG.repo] = replace(birefnet(), commit=RMBG.revision, gated=True)
    done = run(hub, cache, "--only", "rmbg-2.0", "--only", "birefnet")
    assert done.returncode == 1
    for words in (f"{hub.url}/briaai/RMBG-2.0", "CC BY-NC 4.0", "hf auth login", "rmbg-2.0 is gated"):
        assert words in done.stderr
    assert done.stderr.count("rmbg-2.0 is gated") == 2  # before the hours of fetching, and after
    assert loading.local_folder(BIREFNET)  # what may be had was fetched all the same
    assert not hub.fetched("rmbg-2.0")


@pytest.mark.parametrize("sent", [WEIGHTS[:1000], OTHER], ids=["truncated", "wrong"])
def test_a_file_that_is_not_what_the_hub_lists(hub, cache, sent):
    hub.repositories[BIREFNET.repo].forged["model.safetensors"] = sent
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 1
    assert "birefnet: model.safetensors" in done.stderr
    assert "run this again" in done.stderr
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors"):
        loading.local_folder(BIREFNET)
    hub.repositories[BIREFNET.repo].forged.clear()
    assert run(hub, cache, "--only", "birefnet").returncode == 0
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_does_not_end_is_left_at_its_size(hub, cache, name):
    repository = hub.repositories[BIREFNET.repo]
    repository.endless.add(name)
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 1
    size = len(repository.files[name])
    assert f"127.0.0.1 sends more than the {size} bytes of {name}" in done.stderr
    assert hub.sent < ENDLESS / 2
    assert not list((cache / "hub").rglob("*.partial"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_hubs_headers_bring_no_other_file(hub, cache, name):
    repository = hub.repositories[BIREFNET.repo]
    repository.relabelled.add(name)
    assert run(hub, cache, "--only", "birefnet").returncode == 0
    assert blob(cache, BIREFNET, name).name == digest(repository.files[name])


def test_a_list_of_far_more_than_is_known_is_refused(hub, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    with pytest.raises(WeightsError, match=r"birefnet: .* lists 0\.2 MB for it; at most 0\.1 MB are fetched"):
        download.plan(replace(BIREFNET, size_gb=0.00005))
    download.plan(replace(BIREFNET, size_gb=0.00015))
    assert all(entry.size_gb is None or entry.size_gb < 50 for entry in REGISTRY.values())  # more is never fetched


@pytest.mark.parametrize("size", ["200072", -1, 1.5, None])
def test_a_listed_size_that_is_none(size, monkeypatch):
    names = ["config.json", "BiRefNet_config.py", "birefnet.py", "model.safetensors"]
    files = [SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="a" * 40) for name in names]
    files[3].size = size
    repository = SimpleNamespace(sha=BIREFNET.revision, gated=False, siblings=files)
    monkeypatch.setattr(download.HfApi, "model_info", lambda *arguments, **options: repository)
    with pytest.raises(WeightsError, match=r"has no file model\.safetensors"):
        download.plan(BIREFNET)
    repository.sha = "../../elsewhere"
    with pytest.raises(WeightsError, match="names no commit"):
        download.plan(BIREFNET)


def test_a_missing_file_is_named(hub, cache):
    del hub.repositories[BIREFNET.repo].files["birefnet.py"]
    done = run(hub, cache, "--only", "birefnet")
    assert done.returncode == 1
    assert f"at {BIREFNET.revision} has no file birefnet.py" in done.stderr
    assert not hub.fetched("model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "stable-zero123"), "ashawkey/stable-zero123-diffusers does not exist"),
        (("--only", "birefnet", "--revision", "c" * 40), f"has no revision {'c' * 40}"),
        (("--only", "nothing"), "zero123-xl"),
        (("--revision", "main"), "exactly one --only"),
    ],
)
def test_what_the_hub_does_not_have(hub, cache, arguments, words):
    done = run(hub, cache, *arguments)
    assert done.returncode != 0
    assert words in done.stderr


def test_no_hub_and_offline(hub, cache):
    gone = run(Hub({}, "http://127.0.0.1:9"), cache, "--only", "birefnet")
    assert gone.returncode == 1
    assert "can not be asked" in gone.stderr
    assert "is there a connection to the internet? Then run this again" in gone.stderr
    offline = run(hub, cache, "--only", "birefnet", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert not hub.requests


def test_a_proxy_that_lacks_its_package(cache, monkeypatch):
    def refuse(*arguments, **options):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(download.HfApi, "model_info", refuse)
    with pytest.raises(WeightsError, match=r"birefnet: .*can not be asked: .*socksio.*unset or change"):
        download.plan(BIREFNET)


def test_a_hub_that_lists_other_weights_than_public_records_have(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    known = replace(BIREFNET, sha256=(("model.safetensors", digest(WEIGHTS)),))
    assert download.plan(known).commit == BIREFNET.revision
    with pytest.raises(WeightsError, match=r"birefnet: .* has a model\.safetensors that is not the published one"):
        download.plan(replace(known, sha256=(("model.safetensors", digest(OTHER)),)))


class TestOneFile:
    """A checkpoint that is one file at an address of its own, with its SHA-256 in the registry."""

    @pytest.fixture
    def entry(self, hub, cache, monkeypatch) -> Entry:
        monkeypatch.setattr(download, "PAUSE", 0)
        url = f"{hub.url}/{BIREFNET.repo}/resolve/{BIREFNET.revision}/model.safetensors"
        return replace(REGISTRY["alexnet"], url=url, revision=digest(WEIGHTS), size=len(WEIGHTS))

    def test_a_folder_with_a_card_takes_its_place(self, tmp_path):
        card = tmp_path / "card.json"
        card.write_text('{"of": "alexnet"}')
        entry = lookup(ModelChoice(model=str(tmp_path)))
        with pytest.raises(MissingWeights, match=r"alexnet lacks alexnet-owt-7be5be79\.pth"):
            loading.local_folder(entry)
        (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"weights")
        assert (loading.local_folder(entry) / loading.only_file(entry)).read_bytes() == b"weights"
        card.write_text('{"name": "mine", "licence": "MIT"}')
        with pytest.raises(WeightsError, match="mine must be one file: its card should say of which model"):
            loading.only_file(lookup(ModelChoice(model=str(tmp_path))))

    def fetch(self, entry: Entry) -> list[str]:
        said: list[str] = []
        download.fetch(download.plan(entry), said.append)
        return said

    def test_arrives_and_is_not_fetched_again(self, hub, cache, entry):
        with pytest.raises(MissingWeights, match=r"alexnet is not on this machine; get it: .*--only alexnet"):
            loading.local_folder(entry)
        assert download.plan(entry).remaining() == len(WEIGHTS)
        self.fetch(entry)
        assert (loading.local_folder(entry) / loading.only_file(entry)).read_bytes() == WEIGHTS
        assert "SHA-256" in self.fetch(entry)[-1]
        assert download.plan(entry).remaining() == 0
        assert hub.fetched("model.safetensors") == [""]

    def test_goes_on_where_it_was_cut_off(self, hub, cache, entry, large):
        hub.repositories[BIREFNET.repo].cut_after["model.safetensors"] = [CHUNK + 1]
        entry = replace(entry, revision=digest(large), size=len(large))
        self.fetch(entry)
        assert hub.fetched("model.safetensors") == ["", f"bytes={CHUNK}-"]
        assert (loading.local_folder(entry) / loading.only_file(entry)).read_bytes() == large

    def test_what_has_another_hash_is_deleted(self, hub, cache, entry):
        hub.repositories[BIREFNET.repo].forged["model.safetensors"] = OTHER
        with pytest.raises(WeightsError, match=r"model\.safetensors is not what the registry lists \(SHA-256\)"):
            self.fetch(entry)
        with pytest.raises(MissingWeights):
            loading.local_folder(entry)
        del hub.repositories[BIREFNET.repo].forged["model.safetensors"]
        self.fetch(entry)
        loading.local_folder(entry)

    def test_what_is_damaged_is_not_missing(self, hub, cache, entry):
        self.fetch(entry)
        path = loading.local_folder(entry) / loading.only_file(entry)
        path.resolve().write_bytes(WEIGHTS[:-1])
        with pytest.raises(WeightsError, match="bytes, it should have") as caught:
            loading.local_folder(entry)
        assert not isinstance(caught.value, MissingWeights)
        self.fetch(entry)
        loading.local_folder(entry)

    def test_what_is_refused_is_said_at_once(self, hub, cache, entry):
        entry = replace(entry, url=str(entry.url).replace("model.safetensors", "gone.pth"))
        with pytest.raises(WeightsError, match=r"gone\.pth did not arrive: HTTP 404 from 127\.0\.0\.1"):
            self.fetch(entry)
        assert len(hub.fetched("gone.pth")) == 1

    def test_the_hubs_token_stays_away(self, hub, cache, entry, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        sent = []
        get = download.http_get

        def kept(*arguments: Any, headers: dict[str, str], **options: Any) -> None:
            sent.append(headers)
            get(*arguments, headers=headers, **options)

        monkeypatch.setattr(download, "http_get", kept)
        self.fetch(entry)
        assert sent
        assert "authorization" not in {name.lower() for headers in sent for name in headers}

    def test_it_has_no_other_revision(self, hub, cache):
        done = run(hub, cache, "--only", "alexnet", "--revision", "main")
        assert done.returncode == 2
        assert "--revision: alexnet is one file, which has none" in done.stderr
