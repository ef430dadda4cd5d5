"""What a download makes of files that are in the cache already, of its lock, and of the disk."""

from __future__ import annotations

import errno
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from generation.weights import WeightsError, download, loading
from generation.weights.lock import Lock, lock_path, write_lock
from generation.weights.registry import wanted
from tests.support.downloads import BIREFNET, CHUNK, MVDREAM, OTHER, WEIGHTS, blob, run


@pytest.mark.slow
def test_a_damaged_file_of_another_download_is_replaced(hub, cache):
    """Whoever fetched it first: what the lock does not know is hashed."""
    run(hub, cache, "--only", "birefnet")
    blob(cache, BIREFNET, "model.safetensors").write_bytes(OTHER)
    for lock in (cache / "hub").glob("*/lock-*.json"):
        lock.unlink()
    assert "deleted: run this again" in run(hub, cache, "--only", "birefnet").stderr
    assert run(hub, cache, "--only", "birefnet").returncode == 0
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_there_stays_usable_while_it_is_checked(whole, monkeypatch):
    """And for good, if the check is ended: by Ctrl-C here."""

    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(whole, print)
    assert loading.local_folder(BIREFNET)


@pytest.mark.slow
def test_a_file_of_another_download_that_was_cut_short_is_continued(hub, cache, large):
    run(hub, cache, "--only", "birefnet")
    blob(cache, BIREFNET, "model.safetensors").write_bytes(large[: CHUNK + 1])
    hub.requests.clear()
    assert run(hub, cache, "--only", "birefnet").returncode == 0
    assert hub.fetched("model.safetensors") == [f"bytes={CHUNK + 1}-"]
    assert blob(cache, BIREFNET, "model.safetensors").read_bytes() == large


def test_what_was_begun_of_a_replaced_file_is_removed(whole):
    gone, begun = whole.blobs / f"{'a' * 64}.partial", whole.partial(whole.files[0])
    gone.write_bytes(b"half of it")
    begun.write_bytes(b"")
    download.fetch(whole, print)
    assert not gone.exists()
    assert begun.exists()


def test_too_little_disk_is_said_before_anything_is_fetched(hub, cache, monkeypatch):
    Usage = namedtuple("Usage", "free")
    plan = download.Plan(BIREFNET, "a" * 40, (download._File("model.safetensors", 3 * 10**9, "d" * 64, True),))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(free=3_500_000_000))
    with pytest.raises(WeightsError, match=r"too little disk: 3\.5 GB free in .*hub, 4\.0 GB needed.*HF_HOME"):
        download.check_disk([plan])
    plan.blobs.mkdir(parents=True)
    with plan.partial(plan.files[0]).open("wb") as part:
        part.truncate(600_000_000)  # counts as fetched
    download.check_disk([plan])


def test_a_full_disk_holds_what_is_there(cache, monkeypatch):
    Usage = namedtuple("Usage", "free")
    plan = download.Plan(BIREFNET, "a" * 40, (download._File("model.safetensors", 5, "d" * 64, True),))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(free=0))
    plan.blobs.mkdir(parents=True)
    (plan.blobs / plan.files[0].digest).write_bytes(b"whole")
    download.check_disk([plan])


class TestDisk:
    """What it refuses is said in a line. Tests may run as root, who may write anywhere."""

    @pytest.mark.parametrize("name", ["home", "home/hub"])
    def test_a_file_where_the_cache_should_be(self, hub, cache, name):
        path = cache / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        done = run(hub, cache, "--only", "birefnet", HF_HOME=str(cache / "home"))
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert str(path) in done.stderr
        assert "set HF_HOME to a folder that can be written" in done.stderr

    def test_a_file_where_a_model_should_be_does_not_keep_the_others_out(self, hub, cache):
        path = lock_path(BIREFNET).parent
        path.parent.mkdir()
        path.write_text("")
        done = run(hub, cache, "--only", "birefnet", "--only", "mvdream-sd2.1")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert f"birefnet: [Errno 20] Not a directory: '{path}/blobs'; mend that, or set HF_HOME" in done.stderr
        assert loading.local_folder(MVDREAM)

    @pytest.fixture
    def nothing_can_be_written(self, whole, monkeypatch):
        def refuse(self, *arguments, **options):
            raise OSError(errno.EROFS, "Read-only file system", str(self))

        monkeypatch.setattr(Path, "write_text", refuse)
        (whole.blobs.parent / "in_progress").mkdir()  # no place for a file

    @pytest.mark.parametrize("entry", [BIREFNET, replace(BIREFNET, revision="main")], ids=["pinned", "branch"])
    def test_what_is_whole_can_be_checked_without_writing(self, whole, monkeypatch, capsys, request, entry):
        reference = whole.blobs.parent / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text(whole.commit)
        request.getfixturevalue("nothing_can_be_written")
        download.fetch(replace(whole, entry=entry), print)
        said = capsys.readouterr().out
        assert "all 4 files are as the hub lists them; that could not be recorded" in said
        assert "Read-only" in said
        assert loading.local_folder(entry)

    def test_a_recorded_download_is_checked_without_writing(self, whole, request, capsys):
        download.fetch(whole, print)
        (whole.blobs.parent / "in_progress").unlink()
        request.getfixturevalue("nothing_can_be_written")
        capsys.readouterr()
        download.fetch(whole, print)
        assert str(lock_path(BIREFNET)) in capsys.readouterr().out

    def test_an_old_record_that_stays_is_an_error(self, whole, request):
        """The service would follow it."""
        write_lock(BIREFNET, Lock("c" * 40, {}))
        request.getfixturevalue("nothing_can_be_written")
        with pytest.raises(WeightsError, match=r"birefnet: .*Read-only file system: '.*lock-.*HF_HOME"):
            download.fetch(whole, print)

    def test_what_is_not_whole_can_not(self, whole, nothing_can_be_written):
        (whole.blobs / whole.files[0].digest).unlink()
        with pytest.raises(WeightsError, match=r"birefnet: .*in_progress.*HF_HOME"):
            download.fetch(whole, print)


class TestLock:
    def test_an_unpinned_download_stays_at_its_commit(self, hub, cache):
        assert not MVDREAM.pinned
        done = run(hub, cache, "--only", "mvdream-sd2.1")
        assert done.returncode == 0, done.stderr
        folder = loading.local_folder(MVDREAM)
        assert folder.name == "b" * 40
        assert not (folder / "text_encoder" / "model.fp16.safetensors").exists()  # a variant of what is there
        assert not (folder / "README.md").exists()
        # Something else of this machine moves the branch's name in the cache.
        (cache / "hub" / "models--ashawkey--mvdream-sd2.1-diffusers" / "refs" / "main").write_text("c" * 40)
        assert loading.local_folder(MVDREAM) == folder

    def test_a_file_that_was_cut_short_later(self, hub, cache):
        run(hub, cache, "--only", "birefnet")
        code = blob(cache, BIREFNET, "birefnet.py")
        code.write_bytes(b"pass\n")
        with pytest.raises(WeightsError, match=r"birefnet: birefnet\.py has 5 bytes, its download had 2500; get it"):
            loading.local_folder(BIREFNET)

    @pytest.mark.parametrize("content", ['{"commit": "x"}', '{"files": {"a": {"size": 1e999, "digest": ""}}}'])
    def test_a_lock_that_is_none(self, cache, content):
        path = lock_path(BIREFNET)
        path.parent.mkdir(parents=True)
        path.write_text(content)
        with pytest.raises(WeightsError, match=r"lock-.*delete it"):
            loading.local_folder(BIREFNET)


def test_names_that_would_leave_the_cache_are_not_touched(hub, cache):
    hub.repositories[MVDREAM.repo].files["unet/../../../outside.json"] = b"{}"
    assert run(hub, cache, "--only", "mvdream-sd2.1").returncode == 0
    assert not list(cache.rglob("outside.json"))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["a/m.bin", "a/m.safetensors"], ["a/m.safetensors"]),
        (["a/m.bin", "b/m.safetensors"], ["a/m.bin", "b/m.safetensors"]),
        (["a/m.fp16.safetensors", "a/m.safetensors"], ["a/m.safetensors"]),
        (["a/m.fp16.safetensors", "a/config.json"], ["a/config.json", "a/m.fp16.safetensors"]),
        (["a/m-1-of-1.safetensors", "a/m.safetensors.index.json"],) * 2,
    ],
)  # fmt: skip
def test_one_copy_of_the_weights(names, kept):
    assert wanted(names, ("a/*", "b/*")) == kept
