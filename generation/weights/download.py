"""Downloads from the Hugging Face hub, or another address, into the local cache: planned, resumed, hashes checked."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, tqdm

from generation.weights.loading import only_file
from generation.weights.lock import Lock, LockedFile, cache_folder, lock_path, read_lock, write_lock
from generation.weights.registry import REGISTRY, Entry, WeightsError, wanted

#: bytes that must stay free on the disk after a download
RESERVE = 10**9

#: interruptions in a row without progress before a file is given up, and seconds between attempts
PATIENCE, PAUSE = 5, 10

# errno values of a failed write to a disk, which may come without a file name
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

Say = Callable[[str], None]


class _Bar(tqdm):
    """The hub's progress bar, shown in a log file too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        seconds = 0.1 if sys.stderr.isatty() else 10
        super().__init__(*args, **{**options, "disable": False, "mininterval": seconds})


@dataclass(frozen=True)
class _File:
    """A file as the hub describes it."""

    name: str  # path in the repository
    size: int  # bytes
    digest: str  # SHA-256 when `large`, else git's hash of the content
    large: bool  # kept outside of git


@dataclass(frozen=True)
class Plan:
    """The files to fetch for an entry."""

    entry: Entry
    commit: str
    files: tuple[_File, ...]

    @property
    def folder(self) -> Path:
        """Where its files have their names."""
        folder = cache_folder(self.entry)
        return folder if self.entry.url is not None else folder / "snapshots" / self.commit

    @property
    def blobs(self) -> Path:
        """The cache's folder of contents, one file a digest."""
        return cache_folder(self.entry) / "blobs"

    def remaining(self) -> int:
        """Bytes still to be fetched."""
        return sum(file.size - self._have(file) for file in self.files)

    def partial(self, file: _File) -> Path:
        return self.blobs / f"{file.digest}.partial"

    def _have(self, file: _File) -> int:
        for path in (self.blobs / file.digest, self.partial(file)):
            if path.exists():
                return min(path.stat().st_size, file.size)
        return 0


def plan(entry: Entry) -> Plan:
    """Ask the hub for the files of an entry. Raises WeightsError with the reason and what to do."""
    if entry.url is not None:
        return Plan(entry, entry.revision, (_File(only_file(entry), entry.size, entry.revision, large=True),))
    assert entry.repo is not None
    page = f"{constants.ENDPOINT}/{entry.repo}"
    try:
        api = HfApi()
        info = api.model_info(entry.repo, revision=entry.revision, files_metadata=True)
        if info.gated:
            api.auth_check(entry.repo)
    except GatedRepoError as error:
        raise WeightsError(
            f"{entry.name} is gated: log in at {page}, accept its licence ({entry.licence}) there, then type "
            f"'.venv/bin/hf auth login' with a token of that account, and run this again"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{entry.name}: {page} has no revision {entry.revision}") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(f"{entry.name}: {page} does not exist, or not for this account") from error
    except OfflineModeIsEnabled as error:
        raise WeightsError(f"{entry.name}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it") from error
    except (HTTPError, OSError) as error:
        raise WeightsError(f"{entry.name}: {page} can not be asked: {error}; {_remedy(error)}") from error
    except (ValueError, ImportError) as error:  # a proxy that is none, or of a kind that needs another package
        raise WeightsError(
            f"{entry.name}: {page} can not be asked: {error}; mend that, or unset or change https_proxy and its like"
        ) from error
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise WeightsError(f"{entry.name}: {page} names no commit")
    assert info.sha is not None
    there = {file.name: file for sibling in info.siblings or () if (file := _listed(sibling)) is not None}
    names = wanted(list(there), entry.files)
    absent = [pattern for pattern in entry.files if not fnmatch.filter(names, pattern)]
    if absent:
        raise WeightsError(f"{entry.name}: {page} at {info.sha} has no file {', '.join(absent)}")
    for name, digest in entry.sha256:
        if name in there and there[name].digest != digest:
            raise WeightsError(f"{entry.name}: {page} has a {name} that is not the published one (SHA-256)")
    listed, most = sum(there[name].size for name in names), _most_bytes(entry)
    if listed > most:
        raise WeightsError(
            f"{entry.name}: {page} lists {listed / 1e6:,.1f} MB for it; at most {most / 1e6:,.1f} MB are fetched"
        )
    return Plan(entry, info.sha, tuple(there[name] for name in names))


def _most_bytes(entry: Entry) -> float:
    """The most that is fetched for an entry, whatever the hub lists: twice the size that is known of it."""
    known = entry.size_gb if entry.revision == REGISTRY[entry.name].revision else None
    most = constants.MAX_HTTP_DOWNLOAD_SIZE
    return most if known is None else min(most, known * 2e9)


def check_disk(plans: list[Plan]) -> None:
    """Raises WeightsError when the cache's disk has too little space for the remaining files."""
    cache = Path(constants.HF_HUB_CACHE)
    with _writing(str(cache)):
        remaining = sum(each.remaining() for each in plans)
        if remaining == 0:
            return
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    needed = remaining + RESERVE
    if free < needed:
        raise WeightsError(
            f"too little disk: {free / 1e9:.1f} GB free in {cache}, {needed / 1e9:.1f} GB needed; free some, or set "
            f"HF_HOME to a folder on a larger disk (for the service too)"
        )


def fetch(plan: Plan, say: Say) -> None:
    """Bring all of a plan's files into the cache, check them and write the lock. Raises WeightsError.

    Large files in the lock of an earlier download are not hashed again; all others are.
    """
    with _writing(plan.entry.name):
        plan.blobs.mkdir(parents=True, exist_ok=True)
        with _alone(plan):
            _fetch(plan, say)


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Raise OSError of the cache's disk as WeightsError."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{what}: {error}; {_remedy(error)}") from error


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Lock a repository against a second download. Raises WeightsError if one is running."""
    folder = cache_folder(plan.entry)
    try:
        ours = (folder / "in_progress").open("w")
    except OSError:
        if plan.remaining():
            raise
        yield  # a complete but read-only cache can still be checked
        return
    with ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WeightsError(
                f"another download of {plan.entry.name} is at work in {folder}; "
                f"wait for it or end it, then run this again"
            ) from error
        yield


def _fetch(plan: Plan, say: Say) -> None:
    entry = plan.entry
    lock = read_lock(entry) if entry.repo is not None else None
    known = lock.files if lock and lock.commit == plan.commit else {}
    for left in set(plan.blobs.glob("*.partial")) - {plan.partial(file) for file in plan.files}:
        with suppress(OSError):
            left.unlink()  # of a file that the repository has replaced since
    for number, file in enumerate(plan.files, 1):
        say(f"{entry.name} [{number}/{len(plan.files)}] {file.name}, {file.size / 1e6:,.1f} MB")
        try:
            _fetch_content(plan, file, file.large and known.get(file.name) == LockedFile(file.size, file.digest), say)
            _name(plan, file)
        except (HTTPError, EntryNotFoundError, OSError, ImportError) as error:
            raise WeightsError(f"{entry.name}: {file.name} did not arrive: {error}; {_remedy(error)}") from error
    if entry.url is not None:
        say(f"{entry.name}: {plan.files[0].name} has the SHA-256 that it should have; {cache_folder(entry)}")
        return
    _name_revision(plan)
    files = {file.name: LockedFile(file.size, file.digest) for file in plan.files}
    recorded = _record(entry, lock, Lock(plan.commit, files))
    say(f"{entry.name}: all {len(files)} files are as the hub lists them; {recorded}")


def _record(entry: Entry, old: Lock | None, new: Lock) -> str:
    """Write a lock; returns words on where it is. Without one the same files are loaded, so it may be lacking."""
    if new == old:
        return str(lock_path(entry))
    try:
        return str(write_lock(entry, new))
    except OSError as error:
        if old is not None:  # the old lock would still be followed
            raise
        return f"that could not be recorded, so the next run checks them again ({error})"


def _listed(sibling: Any) -> _File | None:
    """A file as the hub lists it; None unless all is of the right kind, and name and digest can be used in paths."""
    name, size = sibling.rfilename, sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    is_name = isinstance(name, str) and name.isprintable() and ".." not in name.split("/") and not name.startswith("/")
    is_size = isinstance(size, int) and size >= 0
    if not is_name or not is_size or re.fullmatch(r"[0-9a-f]{40,64}", str(digest)) is None:
        return None
    return _File(name, size, digest, sibling.lfs is not None)


def _name(plan: Plan, file: _File) -> None:
    """Give the content its name, by a link such as the hub's own download makes."""
    name, content = plan.folder / file.name, plan.blobs / file.digest
    if not (name.exists() and name.samefile(content)):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        name.symlink_to(os.path.relpath(content, name.parent))


def _fetch_content(plan: Plan, file: _File, known: bool, say: Say) -> None:
    """Fetch the content of a file, by its digest. A partial file is kept and continued."""
    entry, blob, partial = plan.entry, plan.blobs / file.digest, plan.partial(file)
    if blob.exists():
        if blob.stat().st_size == file.size:
            # Hashed in place: the snapshot's link points here, and would dangle if this process was killed meanwhile.
            if not known:
                _check(plan, file, blob)
            return
        os.replace(blob, partial)
    partial.touch()
    have = partial.stat().st_size
    if have > file.size:
        os.truncate(partial, 0)
        have = 0
    if 0 < have < file.size:
        say(f"  {have / 1e6:,.1f} MB of it are here already")
    most, standing = have, 0
    while have < file.size:
        try:
            _append(plan, file, have)
        except (HTTPError, OSError) as error:
            if _is_local(error):
                raise
            have = partial.stat().st_size
            most, standing = (have, 0) if have > most else (most, standing + 1)
            if standing == PATIENCE:
                raise WeightsError(
                    f"{entry.name}: {file.name} did not arrive: {_line(error)}, {standing} times in a row; "
                    f"what came is kept: run this again"
                ) from error
            say(f"  cut off at {have / 1e6:,.1f} MB ({_line(error)}); going on in {PAUSE} s")
            time.sleep(PAUSE)
        else:
            break
    _check(plan, file, partial)
    os.replace(partial, blob)


class _TooLong(Exception):
    """More came than a file has."""


class _Bounded(io.BufferedWriter):
    """A file to append to, of at most ``most`` bytes. Raises _TooLong before it writes more."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._most = most

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self._most:
            raise _TooLong
        return super().write(content)


def _append(plan: Plan, file: _File, have: int) -> None:
    """Fetch the rest of a partial file. Raises WeightsError when the server refuses, which a retry would not change."""
    try:
        location, token = (plan.entry.url, False) if plan.entry.url is not None else _address(plan, file)
        with _Bounded(plan.partial(file), file.size) as target:
            http_get(
                location,
                target,
                resume_size=have,
                headers=build_hf_headers(token=None if token else False),
                expected_size=file.size,
                displayed_filename=file.name,
                tqdm_class=_Bar,
            )
    except OfflineModeIsEnabled as error:
        raise WeightsError(f"{plan.entry.name}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it") from error
    except _TooLong as error:
        plan.partial(file).unlink()
        source = urlsplit(location).hostname
        raise WeightsError(
            f"{plan.entry.name}: {source} sends more than the {file.size} bytes of {file.name}; it was deleted: "
            f"run this again"
        ) from error
    except HfHubHTTPError as error:
        if plan.entry.url is None or not _is_refused(error):
            raise
        raise WeightsError(f"{plan.entry.name}: {file.name} did not arrive: {_line(error)}; run this again") from error


def _address(plan: Plan, file: _File) -> tuple[str, bool]:
    """Where the hub's store has a file, new each time, for such addresses expire within an hour; whether it is the hub.

    The hub alone gets the token. Raises WeightsError where the hub itself refuses.
    """
    assert plan.entry.repo is not None
    url = hf_hub_url(plan.entry.repo, file.name, revision=plan.commit)
    try:
        location = get_hf_file_metadata(url).location
    except HfHubHTTPError as error:
        if _is_refused(error):
            reason = " ".join(str(error).split())
            raise WeightsError(f"{plan.entry.name}: {file.name} did not arrive: {reason}; run this again") from error
        raise
    return location, urlsplit(location).netloc == urlsplit(url).netloc


def _is_local(error: Exception) -> bool:
    """Whether the error comes from this machine's disk, not from the network."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_DISK)


def _is_refused(error: Exception) -> bool:
    """Whether the server refuses the request (401, 403, 404), so that a retry is pointless."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)


def _remedy(error: Exception) -> str:
    if _is_local(error):
        return "mend that, or set HF_HOME to a folder that can be written (for the service too)"
    if not isinstance(error, HfHubHTTPError):  # nobody answered
        return "is there a connection to the internet? Then run this again"
    return "run this again"


def _line(error: Exception) -> str:
    """An error in one line. The library's own text would contain the signed address, and advice on tokens."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code} from {error.response.url.host}"
    return (str(error) or repr(error)).splitlines()[0]


def _check(plan: Plan, file: _File, path: Path) -> None:
    """Check the hash of a complete file. If it is wrong, deletes the file and raises WeightsError."""
    if (_sha256(path) if file.large else _git_hash(path)) != file.digest:
        path.unlink()
        source = "the registry" if plan.entry.url is not None else "the hub"
        kind = " (SHA-256)" if file.large else ""
        raise WeightsError(
            f"{plan.entry.name}: {file.name} is not what {source} lists{kind}; it was deleted: run this again"
        )


def _name_revision(plan: Plan) -> None:
    """Let a branch's name stand for the commit in the cache, as the hub's own download does."""
    if plan.entry.revision != plan.commit:
        reference = cache_folder(plan.entry) / "refs" / plan.entry.revision
        if reference.exists() and reference.read_text(encoding="utf-8") == plan.commit:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(plan.commit, encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
