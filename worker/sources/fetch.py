"""Make a source available on this machine: a folder as it is, a hub repository in the source cache. Needs no torch."""

from __future__ import annotations

import glob
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from qbatch.core.adapter_names import ADAPTER_CONFIG
from qbatch.core.domain import SourceRef
from qbatch.core.errors import (
    OUR_DEFECTS,
    DiskFull,
    FetchError,
    JobError,
    SourceCorrupt,
    SourceGated,
    SourceNotFound,
    StorageError,
    UnsafeSource,
)
from qbatch.core.filesystem import NO_SPACE_ERRNOS
from qbatch.core.folder_hint import where_the_model_is
from qbatch.core.identity import fingerprint_of
from qbatch.core.legacy_identity import legacy_hub_fingerprint
from qbatch.core.model_files import content_files, names_code
from qbatch.core.roots import refuse_outside_roots
from qbatch.core.sources import is_hub_id, is_pickled, is_revision, read_headers
from qbatch.worker.files.content import Content, DigestCache, HashedFile, Lister, hash_content
from qbatch.worker.models.remote_code import code_sha256
from qbatch.worker.sources.repository import Repository
from qbatch.worker.sources.source_cache import SourceCache
from qbatch.worker.sources.source_policy import SourcePolicy

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_LISTING_TIMEOUT_S = 30.0
_POLL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A source that can be opened.

    ``fingerprint`` identifies its content. ``legacy_fingerprint`` is the identity that version 0.1.0 gave to this
    content of a hub model, or None if that is not certain. ``revision`` is the commit of a hub model, None for a
    folder. ``runs_code`` says that loading it may run the Python files in ``folder``.
    """

    folder: Path
    fingerprint: str
    revision: str | None
    contents: tuple[Content, ...]
    runs_code: bool = False
    legacy_fingerprint: str | None = None

    def confirm(self) -> None:
        """Raise SourceChanged unless everything read so far was the content that the fingerprint identifies."""
        for content in self.contents:
            content.confirm()


@contextmanager
def fetch_source(
    source: SourceRef,
    *,
    cache: Path,
    cache_bytes: int,
    policy: SourcePolicy,
    on_progress: Callable[[int, int], None],
    digests: DigestCache,
) -> Iterator[LocalSource]:
    """Fetch the source, check its headers, and hash its content. The cache keeps it while the context lasts.

    ``on_progress(bytes_done, bytes_total)`` is called from other threads, one at a time, during a download, a
    conversion, or the hashing of files that ``digests`` does not know, and never after this has yielded. The token of
    the hub comes from the environment (``HF_TOKEN``).

    Raises SourceNotFound, SourceGated, SourceCorrupt, UnsafeSource, SourceChanged or DiskFull; FetchError if a retry
    may help; Unsupported for a repository larger than ``cache_bytes``; StorageError for a folder that cannot be read.
    """
    with ExitStack() as held:
        fetch = _Fetch(
            source=source,
            cache=SourceCache(root=cache, limit_bytes=cache_bytes),
            policy=policy,
            on_progress=on_progress,
            digests=digests,
            held=held,
        )
        yield fetch.run()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    """Fetches one source. The cache entries that it needs stay in use until ``held`` is closed."""

    source: SourceRef
    cache: SourceCache
    policy: SourcePolicy
    on_progress: Callable[[int, int], None]
    digests: DigestCache
    held: ExitStack

    def run(self) -> LocalSource:
        if self.source.is_folder:
            return self._folder_source(Path(self.source.location))
        self._check_names()
        with _hub_faults(self.source):
            return self._offline_source() if is_offline_mode() else self._hub_source()

    def _check_names(self) -> None:
        """Check again what submit has checked, because id and revision become parts of paths in the caches."""
        revision = self.source.revision
        if not is_hub_id(self.source.location) or not (revision is None or is_revision(revision)):
            raise UnsafeSource("the job does not name a valid hub id or revision")

    @property
    def _is_trusted(self) -> bool:
        # The submitter chooses the revision, and anyone can propose one on the hub: trust in a name without a revision
        # does not extend to all of them.
        return _name(self.source) in self.policy.trusted

    def _folder_source(self, folder: Path) -> LocalSource:
        refuse_outside_roots(folder, self.policy.roots)
        try:
            # Resolved once, because a link could point elsewhere for a moment without being noticed.
            return self._opened(folder.resolve(), None)
        except OSError as error:
            raise StorageError(f"{folder} cannot be read: {error.strerror or error}") from error

    def _offline_source(self) -> LocalSource:
        """Use the model from the user's Hugging Face cache."""
        source = self.source
        where = f"{_name(source)}: HF_HUB_OFFLINE is set, and the Hugging Face cache"
        config = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
        if not isinstance(config, str):
            raise SourceNotFound(f"{where} does not contain it")
        folder = Path(config).parent
        try:
            return self._opened(folder, folder.name, _names_of_blobs)
        except (SourceNotFound, SourceCorrupt) as error:
            raise SourceNotFound(f"{where} contains only a part of it: {error}") from error

    def _hub_source(self) -> LocalSource:
        repository = self._resolve()
        folder = self._entry(repository.entry, lambda: _download(repository, self.cache))
        try:
            return self._opened(folder, repository.commit, lambda _: repository.hashes)
        except _DiffersFromHub as error:
            # The next attempt downloads it again.
            error.path.unlink(missing_ok=True)
            raise FetchError(
                f"{_name(self.source)}: the downloaded {error.path.name} does not match the hub's checksum"
            ) from error

    def _resolve(self) -> Repository:
        repository = _resolve(self.source)
        return replace(repository, allow_pickle=self.policy.allow_pickle, with_code=self._is_trusted)

    def _entry(self, entry: str, fill: Callable[[], None]) -> Path:
        """The folder of a cache entry. If the entry is not complete, it is filled first."""
        folder = self.held.enter_context(self.cache.using(entry))
        if not self.cache.is_complete(entry):
            with _progress(self.cache, entry, self.on_progress), self.cache.filling(entry):
                # The process that held the lock before may have filled it.
                if not self.cache.is_complete(entry):
                    fill()
        return folder

    def _opened(
        self, folder: Path, commit: str | None, hub_hashes: Callable[[Content], Mapping[str, str]] | None = None
    ) -> LocalSource:
        """Check and hash the model in ``folder``. ``hub_hashes`` returns the hub's own hashes of its files."""
        pickled = self.policy.allow_pickle and is_pickled(folder)
        if not pickled:
            read_headers(folder)
        runs_code = self._is_trusted and names_code(folder)
        content = self._hash(
            lambda: content_files(folder, with_code=runs_code, allow_pickle=pickled), whole=hub_hashes is not None
        )
        fingerprint = fingerprint_of(content.root_sha256, runs_code=runs_code)
        legacy = None
        if commit is not None and hub_hashes is not None and self._is_the_hubs(content, hub_hashes(content)):
            legacy = legacy_hub_fingerprint(commit, code_sha256(folder) if runs_code else None)
        source = LocalSource(
            folder=folder,
            fingerprint=fingerprint,
            revision=commit,
            contents=(content,),
            runs_code=runs_code,
            legacy_fingerprint=legacy,
        )
        return self._converted(source) if pickled else source

    def _is_the_hubs(self, content: Content, hashes: Mapping[str, str]) -> bool:
        """Whether every file has the hub's hash.

        Raises _DiffersFromHub for a file in our own cache that has not. In the user's cache such a file is accepted:
        the content decides which model it is.
        """
        for file in content.files:
            expected = hashes.get(file.name)
            if expected is not None and _hub_hash(file, expected) != expected:
                if is_offline_mode():
                    return False
                raise _DiffersFromHub(file.path)
        return all(file.name in hashes for file in content.files)

    def _hash(self, lister: Lister, *, whole: bool = False) -> Content:
        return hash_content(lister, self.digests, whole=lambda _: whole, on_progress=self.on_progress)

    def _converted(self, source: LocalSource) -> LocalSource:
        """The pickles of ``source`` converted to safetensors, from the cache if they are there and unchanged."""
        from qbatch.worker.sources.pickles import convert, converted_entry

        entry = converted_entry(source.folder, source.fingerprint)

        def fill() -> None:
            convert(source.folder, self.cache, entry, with_code=source.runs_code)
            # If the pickles changed during the conversion, the result must not be kept under their identity.
            source.confirm()
            self.cache.set_root(entry, hash_content(listed, self.digests).root_sha256)

        def listed() -> Mapping[str, Path]:
            return content_files(self.cache.root / entry, with_code=source.runs_code)

        folder = self._entry(entry, fill)
        content = self._hash(listed)
        if content.root_sha256 != self.cache.root_sha256(entry):
            self.cache.forget(entry)
            self._entry(entry, fill)
            content = self._hash(listed)
            if content.root_sha256 != self.cache.root_sha256(entry):
                raise StorageError(f"the content of {folder} differs from what was just written there")
        read_headers(folder)
        return replace(source, folder=folder, contents=(*source.contents, content))


class _DiffersFromHub(Exception):
    """The hash of a file differs from the one that the hub lists."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def _hub_hash(file: HashedFile, expected: str) -> str | None:
    """The file's hash of the same kind as ``expected``: sha256, or the id of a git blob."""
    if len(expected) == _SHA256_DIGITS:
        return file.checksums.sha256
    digest = hashlib.sha1(b"blob %d\0" % file.stat.size, usedforsecurity=False)
    with file.path.open("rb") as blob:
        while data := blob.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def _names_of_blobs(content: Content) -> dict[str, str]:
    """The hub's hashes of files in the Hugging Face cache, whose blobs are named by their hash."""
    return {file.name: name for file in content.files if _HASH.fullmatch(name := Path(file.stat.path).name)}


def _resolve(source: SourceRef) -> Repository:
    info = HfApi().model_info(
        source.location, revision=source.revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
    )
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    files = {path: size for path, size in sizes.items() if size is not None and ".." not in PurePosixPath(path).parts}
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    if info.sha is None or not _COMMIT.fullmatch(info.sha) or len(files) < len(sizes):
        raise FetchError(
            f"{_name(source)}: the hub's list of files lacks the commit or a size, or has a path outside the repository"
        )
    known = {path: digest for path, digest in hashes.items() if digest is not None and _HASH.fullmatch(digest)}
    return Repository(repo_id=source.location, commit=info.sha, files=files, hashes=known)


def _download(repository: Repository, cache: SourceCache) -> None:
    folder = cache.root / repository.entry
    for incomplete in folder.glob(".cache/huggingface/**/*.incomplete"):
        incomplete.unlink()
    if repository.is_adapter:
        _snapshot(repository, folder, [ADAPTER_CONFIG])
        raise SourceNotFound(f"{repository.repo_id} has no model{where_the_model_is(folder)}")
    repository.check()
    if repository.listing_files:
        _snapshot(repository, folder, repository.listing_files)
    wanted = repository.wanted(folder)
    cache.reserve(repository.entry, {path: repository.files[path] for path in wanted})
    _snapshot(repository, folder, wanted)
    if not cache.is_complete(repository.entry):
        # If the folder is not empty, the library reports success even when the hub cannot be reached.
        raise FetchError(f"{repository.repo_id}: the download is incomplete")


def _snapshot(repository: Repository, folder: Path, paths: Iterable[str]) -> None:
    disable_progress_bars()
    snapshot_download(
        repository.repo_id,
        revision=repository.commit,
        local_dir=folder,
        allow_patterns=[glob.escape(path) for path in paths],
    )


@contextmanager
def _progress(cache: SourceCache, entry: str, on_progress: Callable[[int, int], None]) -> Iterator[None]:
    """Report the progress of a download from the size of the entry on disk, whichever process is downloading."""
    ended = threading.Event()

    def report() -> None:
        total = sum(cache.plan(entry).values())
        if total:
            on_progress(min(cache.held_bytes(entry), total), total)

    def poll() -> None:
        while not ended.wait(_POLL_S):
            report()
        report()

    thread = threading.Thread(target=poll, name="fetch-progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _hub_faults(source: SourceRef) -> Iterator[None]:
    """Translate the exceptions of huggingface_hub into ours."""
    try:
        yield
    except (JobError, *OUR_DEFECTS):
        raise
    except Exception as error:  # from httpx, httpx2 or hf_xet, depending on the version; they share no other base
        raise _as_job_error(source, error) from error


def _as_job_error(source: SourceRef, error: BaseException) -> JobError:
    name = _name(source)
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        # This is the library's summary; only the cause tells whether the hub refused or did not answer.
        return _as_job_error(source, error.__cause__)
    if isinstance(error, GatedRepoError):
        return SourceGated(f"{name} is gated: accept its terms on the hub, and set HF_TOKEN for the workers")
    if isinstance(error, RepositoryNotFoundError):
        return SourceNotFound(
            f"{name}: no such repository on the hub, or it is private and the workers' HF_TOKEN gives no access"
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceNotFound(f"{name}: the repository has no such revision")
    if isinstance(error, HFValidationError):
        return SourceNotFound(f"{name} is not a valid name of a hub repository")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return SourceGated(f"{name}: the hub refuses access with the workers' HF_TOKEN")
    if getattr(error, "errno", None) in NO_SPACE_ERRNOS or "(os error 28)" in str(error):
        return DiskFull(f"{name}: the disk of the source cache is full")
    return FetchError(f"{name}: {_one_line(error)}")


def _name(source: SourceRef) -> str:
    return f"{source.location}@{source.revision}" if source.revision else source.location


def _one_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    # The query of a redirect contains a signature with which any reader of the log could download the file.
    return f"{type(error).__name__}: {re.sub(r'[?][^ ]+', '', line)[:300]}"
