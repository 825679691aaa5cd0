#!/usr/bin/python
"""Ansible module hub_download: bring one commit of a model into its folder, checked, whole, and in one step."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: hub_download
short_description: Bring one commit of a model into its folder
description:
  - Takes the files of one commit from the Hugging Face Hub, from a folder or from an archive, checks them, writes the
    manifest C(SHA256SUMS) and renames the folder into place as C(home/COMMIT) in one step.
  - Works in slices of O(seconds). A call returns RV(done) false if there is more to do; the next call goes on with what
    is there, inside a file too. The action plugin of the same name makes the calls and shows the progress.
  - A call takes longer where work cannot be cut, which is the check of the files, an archive, and a file from a server
    without HTTP Range.
  - What was interrupted, by a full disk too, lies in C(home/COMMIT.incoming) and is taken up again.
options:
  hub:
    description: URL of the Hub, or of a mirror that speaks its protocol. One of O(hub), O(folder), O(archive).
    type: str
  repository:
    description: Organisation and name of the repository on the Hub.
    type: str
  token:
    description: Access token, sent to the Hub's own scheme, host and port and to nobody else.
    type: str
  folder:
    description:
      - Folder on the host that has the files. If it has a C(SHA256SUMS), the files must be those that it lists.
      - The first line of its file C(REVISION) is the commit; without one, the start of the manifest's SHA-256 is.
    type: path
  archive:
    description: A tar archive of such a folder, plain or compressed with gzip, bzip2, xz or zstd.
    type: path
  revision:
    description:
      - The full commit hash. With O(folder) and O(archive) it may be left out; if given, they must hold that commit.
    type: str
  home:
    description: Folder for the commits of the repository; created if need be.
    type: path
    required: true
  seconds:
    description: How many seconds after the first byte to return, if there is more to do.
    type: int
    default: 15
attributes:
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
"""

EXAMPLES = r"""
- name: Download the weights
  dots_ocr.deploy.hub_download:
    hub: https://huggingface.co
    repository: dots-studio/dots.ocr
    revision: 0123456789abcdef0123456789abcdef01234567
    home: /var/lib/dots-ocr/models/dots-studio--dots_ocr
"""

RETURN = r"""
done:
  description: Whether the commit is in place; if not, call again.
  returned: success
  type: bool
path:
  description: The commit's folder; empty as long as it is unknown.
  returned: success
  type: str
revision:
  description: The commit; empty as long as it is unknown.
  returned: success
  type: str
bytes_total:
  description: Size of all files; 0 if the commit was in place before.
  returned: success
  type: int
bytes_done:
  description: How much of it is there.
  returned: success
  type: int
bytes_received:
  description: How much was transferred now; through the action plugin, in all calls.
  returned: success
  type: int
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import lzma
import math
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

MANIFEST = "SHA256SUMS"
MANIFEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")
REVISION = "REVISION"
COMMIT = re.compile(r"[0-9a-f]{40}")
PART = ".part"
INCOMING = ".incoming"
LOCK = ".lock"
# What 'hf download --local-dir' and 'git clone' leave beside the files.
NOT_FILES = (".cache", ".git")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK = 1 << 20

TRIES = 5
FIRST_DELAY_SECONDS = 1.0
TIMEOUT_SECONDS = 30


class Problem(Exception):
    """What the operator has to mend; the message names the fix."""


class Fault(Exception):
    """What may pass by itself, and is worth another try."""


class Entry(NamedTuple):
    """A file: path in the folder, size in bytes, and the digests it must have, empty where nobody says."""

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


def check_path(path: str) -> str:
    """Return a path from a listing; raises Problem if it leaves the folder or cannot stand in a manifest."""
    outside = any(part in ("", ".", "..") for part in path.split("/"))
    if outside or "\\" in path or not path.isprintable():
        raise Problem(f"The list of files has the unsafe path {path!r}. Fix: get the weights from a source you trust")
    return path


def check_entries(entries: list[Entry]) -> list[Entry]:
    """Return the entries; raises Problem if one is unsafe, or has a name that the role needs for itself."""
    paths = [check_path(entry.path) for entry in entries]
    reserved = [path for path in paths if path == MANIFEST or path.endswith(PART)]
    if reserved or len(set(paths)) < len(paths):
        raise Problem(
            f"The list of files has {', '.join(reserved) or 'a path twice'}, which cannot be."
            " Fix: get the weights from a source you trust"
        )
    return entries


def manifest(sums: dict[str, str]) -> str:
    """Return the manifest, as sha256sum writes it, for the SHA-256 of each path."""
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))


def commit_of(sums: dict[str, str]) -> str:
    """Return the name of a commit that has none from a repository."""
    return hashlib.sha256(manifest(sums).encode()).hexdigest()[:40]


class Source:
    """Where the files come from."""

    name = ""  # for messages
    commit = ""  # empty as long as it is unknown
    key = ""  # names the folder for what arrives: equal for equal files only
    sliced = True  # whether a transfer can end at any byte and go on later
    faults: tuple[type[Exception], ...] = ()  # what reading may raise that is worth another try
    received = 0  # bytes

    def entries(self) -> list[Entry]:
        """Return the files; raises Problem if nobody can say."""
        raise NotImplementedError

    def open(self, entry: Entry, offset: int) -> tuple[Any, int, bool]:
        """Open a file; return its content, the byte it begins with, and whether it can begin at any later."""
        raise NotImplementedError

    def exhausted(self, fault: Fault) -> Problem:
        """Return the problem that a fault is once it has lasted."""
        return Problem(f"{self.name} changes while it is read: {fault}. Fix: run again when it is complete")


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, with the token only to where the Hub itself is."""

    def __init__(self, hub: str, token: str) -> None:
        """Remember whose token it is."""
        self.hub = hub
        self.token = token

    def authorize(self, request: urllib.request.Request) -> urllib.request.Request:
        """Add the token to a request to the Hub's own origin, in the way that no redirect copies."""
        if self.token and origin(request.full_url) == origin(self.hub):
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return request

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows a redirect."""
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            raise Problem(f"{req.host} redirects to {newurl}, which is not secure. Fix: check dots_ocr_model_hub")
        # Python before 3.11 does not know 308.
        request = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        return self.authorize(request) if request else None

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class Hub(Source):
    """A repository on the Hub at one commit."""

    faults = (OSError, http.client.HTTPException)

    def __init__(self, hub: str, repository: str, commit: str, token: str) -> None:
        """Name it; nothing is asked yet."""
        if urllib.parse.urlsplit(hub).scheme not in ("http", "https"):
            raise Problem(f"{hub!r} is no URL of a Hub. Fix: check dots_ocr_model_hub")
        self.hub = hub.rstrip("/")
        self.name = f"{repository} at commit {commit}"
        self.commit = self.key = commit
        self.files = f"{self.hub}/{urllib.parse.quote(repository)}/resolve/{commit}/"
        self.tree = f"{self.hub}/api/models/{urllib.parse.quote(repository)}/tree/{commit}?recursive=true"
        self.redirects = Redirects(self.hub, token)
        self.opener = urllib.request.build_opener(self.redirects)

    def exhausted(self, fault: Fault) -> Problem:
        """Return the problem that a fault is once it has lasted."""
        return Problem(
            f"{self.hub} does not give {self.name}: {fault}. Fix: check that the host reaches the Hub,"
            " dots_ocr_model_hub, and behind a proxy http_proxy, https_proxy and no_proxy, then run again: what has"
            " arrived is kept"
        )

    def get(self, url: str, headers: dict[str, str] | None = None) -> Any:
        """Return the response to a GET; raises Fault, or Problem if another try is in vain."""
        request = urllib.request.Request(url, headers={"User-Agent": "dots-ocr-deploy", **(headers or {})})
        try:
            return self.opener.open(self.redirects.authorize(request), timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 416, 429) or error.code >= 500:
                raise Fault(f"status {error.code}") from error
            fix = "check dots_ocr_model_repository, dots_ocr_model_revision and dots_ocr_model_hub"
            if error.code == 407:
                fix = "check the user and the password in http_proxy and https_proxy"
            if error.code in (401, 403):
                fix += ", and whether dots_ocr_model_token may read it"
            what = f"status {error.code} for {urllib.parse.urlsplit(url).path}"
            raise Problem(f"{self.hub} does not give {self.name}: {what}. Fix: {fix}") from error
        except self.faults as error:
            raise Fault(str(getattr(error, "reason", error)) or type(error).__name__) from error

    def entries(self) -> list[Entry]:
        """Ask for the files of the commit."""
        listing: list[Any] = []
        url = self.tree
        while url:
            page, url = self.retry(url)
            listing += page
        try:
            return [self.entry(item) for item in listing if item["type"] == "file"]
        except (KeyError, TypeError, ValueError) as error:
            raise Problem(f"{self.hub} lists files in an unknown way. Fix: check dots_ocr_model_hub") from error

    def retry(self, url: str) -> tuple[list[Any], str]:
        """Return what page() does, after several tries if need be."""
        for number in range(TRIES - 1):
            try:
                return self.page(url)
            except Fault:
                time.sleep(FIRST_DELAY_SECONDS * 2**number)
        try:
            return self.page(url)
        except Fault as fault:
            raise self.exhausted(fault) from fault

    def page(self, url: str) -> tuple[list[Any], str]:
        """Return a page of the listing and the URL of the next one, empty after the last."""
        with self.get(url) as response:
            try:
                listing = json.loads(response.read())
                if not isinstance(listing, list):
                    raise ValueError("no list")
            except self.faults as error:
                raise Fault(str(error)) from error
            except ValueError as error:
                raise Problem(
                    f"{self.hub} answers with something else than a list of files. Fix: check dots_ocr_model_hub, and"
                    " whether a proxy stands between"
                ) from error
            following = re.search(r'<([^>]+)>; *rel="next"', response.headers.get("Link", ""))
            return listing, urllib.parse.urljoin(url, following[1]) if following else ""

    @staticmethod
    def entry(item: dict[str, Any]) -> Entry:
        """Return the entry for an item of the listing; a large file's git object is but a pointer to it."""
        if "lfs" in item:
            return Entry(str(item["path"]), int(item["lfs"]["size"]), sha256=str(item["lfs"]["oid"]))
        return Entry(str(item["path"]), int(item["size"]), git_sha1=str(item["oid"]))

    def open(self, entry: Entry, offset: int) -> tuple[Any, int, bool]:
        """Ask for a file; the status tells whether the server can begin at any byte, so byte 0 is asked for too."""
        response = self.get(self.files + urllib.parse.quote(entry.path), {"Range": f"bytes={offset}-"})
        if response.status != 206:
            return response, 0, False
        match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != offset:
            response.close()
            raise Fault("another part of a file than was asked for")
        return response, offset, True


class Local(Source):
    """A folder or an archive on the host: what both have in common."""

    def adopt(self, sizes: dict[str, int], texts: dict[str, str], stamp: Any) -> list[Entry]:
        """Return the entries for the files and their sizes; raises Problem if these are not the files of a model.

        Args:
            sizes: bytes of each path.
            texts: the contents of SHA256SUMS and REVISION, where there are any.
            stamp: changes when the files do.
        """
        revision = texts.get(REVISION, "").strip()
        if REVISION in texts and not COMMIT.fullmatch(revision):
            raise Problem(f"{REVISION} in {self.name} is no full commit hash. Fix: write one, or remove the file")
        sums = self.parse(texts.get(MANIFEST, ""))
        wanted = {path for path in sizes if path != MANIFEST and path.split("/")[0] not in NOT_FILES}
        if REVISION not in sums:
            wanted.discard(REVISION)
        if MANIFEST in texts and set(sums) != wanted:
            differ = ", ".join(sorted(set(sums) ^ wanted))
            raise Problem(f"{MANIFEST} of {self.name} and its files are not the same: {differ}. Fix: copy it anew")
        if "config.json" not in wanted:
            raise Problem(f"{self.name} has no config.json, so it is no model. Fix: name the one that has the files")
        self.commit = revision or (commit_of(sums) if sums else "")
        self.key = commit_of(sums) if sums else hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
        return [Entry(path, sizes[path], sums.get(path, "")) for path in sizes if path in wanted]

    def parse(self, text: str) -> dict[str, str]:
        """Return the SHA-256 of each path that a manifest lists."""
        sums = {}
        for line in text.splitlines():
            match = MANIFEST_LINE.fullmatch(line)
            if not match:
                raise Problem(f"{MANIFEST} of {self.name} has the line {line!r}. Fix: write it with sha256sum")
            sums[check_path(match[2])] = match[1]
        return sums


class Folder(Local):
    """A folder on the host that has the files."""

    def __init__(self, folder: str) -> None:
        """Name it; nothing is read yet."""
        self.folder = Path(folder)
        self.name = f"the folder {folder}"

    def entries(self) -> list[Entry]:
        """Look at the files."""
        if not self.folder.is_dir():
            raise Problem(f"There is no folder {self.folder} on the host. Fix: check dots_ocr_model_folder")
        sizes, texts, stamp = {}, {}, []
        for parent, folders, files in os.walk(self.folder):
            if Path(parent) == self.folder:
                folders[:] = [name for name in folders if name not in NOT_FILES]
            for name in files + [name for name in folders if Path(parent, name).is_symlink()]:
                file = Path(parent, name)
                path = str(file.relative_to(self.folder))
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise Problem(f"{file} is no regular file. Fix: copy the folder with 'cp -r --dereference'")
                sizes[path] = status.st_size
                stamp.append((path, status.st_size, status.st_mtime_ns))
                if path in (MANIFEST, REVISION):
                    texts[path] = file.read_text(encoding="utf-8", errors="replace")
        return self.adopt(sizes, texts, sorted(stamp))

    def open(self, entry: Entry, offset: int) -> tuple[Any, int, bool]:
        """Open a file."""
        content = (self.folder / entry.path).open("rb")
        content.seek(offset)
        return content, offset, True


class Archive(Local):
    """A tar archive on the host, read from start to end: once to look at the members, once to unpack them."""

    sliced = False

    def __init__(self, archive: str) -> None:
        """Name it; nothing is read yet."""
        self.archive = Path(archive)
        self.name = f"the archive {archive}"
        self.top = ""  # of all paths, with its slash, where they have one folder in common
        self.members = self.walk()

    @contextlib.contextmanager
    def tar(self) -> Iterator[tarfile.TarFile]:
        """Open the archive for one pass."""
        with self.archive.open("rb") as file:
            is_zstd = file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
        if not is_zstd:
            with tarfile.open(self.archive, mode="r|*") as tar:
                yield tar
            return
        zstd = shutil.which("zstd")
        if not zstd:
            raise Problem(f"{self.name} needs the program zstd. Fix: install zstd on the host, or use a .tar.gz")
        command = [zstd, "--decompress", "--stdout", "--quiet", "--long=31", str(self.archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield tar
            # Its checksum is at the end.
            while process.stdout and process.stdout.read(CHUNK):
                pass
        if process.returncode != 0:
            raise tarfile.ReadError("zstd finds it damaged")

    def walk(self) -> Iterator[tuple[str, int, Any]]:
        """Yield path, size in bytes and content of each file in one pass."""
        with self.tar() as tar:
            for member in tar:
                path = member.name[2:] if member.name.startswith("./") else member.name
                content = tar.extractfile(member) if member.isreg() else None
                if content:
                    yield check_path(path), member.size, content
                elif not member.isdir():
                    raise Problem(f"{path} in {self.name} is no regular file. Fix: pack it with tar's --dereference")

    def entries(self) -> list[Entry]:
        """Look at the members."""
        if not self.archive.is_file():
            raise Problem(f"There is no archive {self.archive} on the host. Fix: check dots_ocr_model_archive")
        sizes: dict[str, int] = {}
        texts = {}
        for path, size, content in self.walk():
            if path in sizes:
                raise Problem(f"{self.name} has {path} twice. Fix: pack it anew")
            sizes[path] = size
            if path.split("/")[-1] in (MANIFEST, REVISION):
                texts[path] = content.read(16 * CHUNK).decode(errors="replace")
        first = next(iter(sizes), "").partition("/")[0] + "/"
        if all(path.startswith(first) for path in sizes):
            self.top = first
        cut = len(self.top)
        status = self.archive.stat()
        return self.adopt(
            {path[cut:]: size for path, size in sizes.items()},
            {path[cut:]: text for path, text in texts.items()},
            (status.st_size, status.st_mtime_ns),
        )

    def open(self, entry: Entry, offset: int) -> tuple[Any, int, bool]:
        """Go on to a file; the entries must be opened in their order."""
        for path, _, content in self.members:
            if path == self.top + entry.path:
                return content, 0, False
        raise Fault(f"{entry.path} is gone")


def size_of(file: Path) -> int:
    """Return the size of a file in bytes, -1 if there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1


def part_of(file: Path) -> Path:
    """Return where a file grows."""
    return file.with_name(file.name + PART)


def held(entry: Entry, incoming: Path) -> int:
    """Return how many bytes of a file have arrived."""
    file = incoming / entry.path
    return entry.size if size_of(file) == entry.size else min(max(size_of(part_of(file)), 0), entry.size)


def check_space(entries: list[Entry], incoming: Path) -> None:
    """Raise Problem if what has not arrived yet does not fit."""
    missing = sum(entry.size - held(entry, incoming) for entry in entries)
    place = incoming
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if missing > free:
        raise no_space(incoming.parent, f"{missing / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")


def no_space(home: Path, what: str) -> Problem:
    """Return the problem that a full file system is."""
    return Problem(
        f"The file system of {home} is too small: {what}. Fix: free some space or choose another dots_ocr_model_root,"
        " then run again: what has arrived is kept"
    )


class Clock:
    """The time of a slice. It begins with the first byte: until a server sends that, many seconds may pass."""

    def __init__(self, seconds: float) -> None:
        """Take the length of the slice."""
        self.seconds = seconds
        self.end = math.inf

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self.end == math.inf:
            self.end = time.monotonic() + self.seconds

    def over(self) -> bool:
        """Tell whether the slice is over."""
        return time.monotonic() >= self.end


def fetch(source: Source, entry: Entry, incoming: Path, clock: Clock) -> None:
    """Complete a file, from where an earlier call came to, or leave it as it is when the slice is over."""
    file = incoming / entry.path
    part = part_of(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    furthest, in_vain = size_of(part), 0
    while True:
        try:
            if not receive(source, entry, part, clock):
                return
            break
        except Fault as fault:
            in_vain = 0 if size_of(part) > furthest else in_vain + 1
            furthest = max(furthest, size_of(part))
            if in_vain == TRIES:
                raise source.exhausted(fault) from fault
            time.sleep(FIRST_DELAY_SECONDS * 2**in_vain / 2)
    part.chmod(0o644)
    part.rename(file)


def receive(source: Source, entry: Entry, part: Path, clock: Clock) -> bool:
    """Add to a part what it lacks, over one connection; return False if the slice was over first; raises Fault."""
    part.touch()
    offset = size_of(part)
    if offset == entry.size:
        return True
    content, start, anywhere = source.open(entry, offset if offset < entry.size else 0)
    with contextlib.closing(content), part.open("r+b") as file:
        file.seek(start)
        file.truncate()
        left = entry.size - start
        while left:
            try:
                chunk = content.read1(min(left, CHUNK))
            except source.faults as error:
                raise Fault(str(error) or type(error).__name__) from error
            if not chunk:
                raise Fault(f"{entry.path} ends after {entry.size - left} of {entry.size} bytes")
            file.write(chunk)
            left -= len(chunk)
            source.received += len(chunk)
            clock.start()
            if left and anywhere and clock.over():
                return False
    return True


def digest(content: Any, algorithm: Any = None) -> str:
    """Return the digest of what is left of a content, SHA-256 unless another algorithm has been begun."""
    algorithm = algorithm or hashlib.sha256()
    while chunk := content.read(CHUNK):
        algorithm.update(chunk)
    return str(algorithm.hexdigest())


def git_object_id(file: Path, size: int) -> str:
    """Return what git calls a file of some bytes."""
    with file.open("rb") as content:
        return digest(content, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))


def check_digests(source: Source, entries: list[Entry], incoming: Path) -> dict[str, str]:
    """Return the SHA-256 of each path; raises Problem for files with another content than they must have, and
    removes them."""
    sums, bad = {}, []
    for entry in entries:
        file = incoming / entry.path
        with file.open("rb") as content:
            sums[entry.path] = digest(content)
        good = entry.sha256 in ("", sums[entry.path])
        if not good or (entry.git_sha1 and entry.git_sha1 != git_object_id(file, entry.size)):
            file.unlink()
            bad.append(entry.path)
    if bad:
        raise Problem(
            f"The checksum is wrong of {', '.join(bad)} from {source.name}; removed. Fix: run again, which fetches"
            " anew what was removed; if that does not help, the source is damaged"
        )
    return sums


def put_in_place(sums: dict[str, str], incoming: Path, final: Path) -> None:
    """Write the manifest and rename the folder; after a power failure it is there either whole or not at all."""
    for parent, folders, files in os.walk(incoming, topdown=False):
        for name in files:
            if str(Path(parent, name).relative_to(incoming)) not in sums:
                Path(parent, name).unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # only the empty ones
                Path(parent, name).rmdir()
    (incoming / MANIFEST).write_text(manifest(sums), encoding="utf-8")
    for parent, _, files in os.walk(incoming):
        for path in [*(Path(parent, name) for name in files), Path(parent)]:
            sync(path)
    incoming.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Have a file or folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def choose(params: dict[str, Any]) -> Source:
    """Return the source that the options name."""
    if params["folder"]:
        return Folder(params["folder"])
    if params["archive"]:
        return Archive(params["archive"])
    return Hub(params["hub"], params["repository"], params["revision"], params["token"] or "")


def check_commit(source: Source, wanted: str) -> None:
    """Raise Problem if a source holds another commit than is wanted."""
    if wanted and source.commit and source.commit != wanted:
        raise Problem(
            f"{source.name} holds commit {source.commit}, but {wanted} is wanted. Fix: give the weights of that"
            " commit, or set dots_ocr_model_upgrade to go over to the other one"
        )


def in_place(home: Path, commit: str) -> bool:
    """Tell whether a commit is there; raises Problem if a folder is, of which nobody knows whether it is whole."""
    folder = home / commit
    if not commit or not folder.exists():
        return False
    if not (folder / MANIFEST).exists():
        raise Problem(f"{folder} has no {MANIFEST}. Fix: remove the folder and run again, which fetches it anew")
    return True


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Wait for other calls that work in a folder: one whose controller was interrupted goes on to its slice's end."""
    # Not the folder itself: everybody may open that, so everybody could lock it.
    descriptor = os.open(home / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Call:
    """One slice of the work: what it shall do, and how far it has come."""

    def __init__(self, params: dict[str, Any]) -> None:
        """Take the module's options."""
        self.home = Path(params["home"])
        self.wanted = params["revision"] or ""
        self.seconds = params["seconds"]
        if self.wanted and not COMMIT.fullmatch(self.wanted):
            raise Problem(f"{self.wanted} is no full commit hash. Fix: give all its 40 digits")
        self.source = choose(params)
        self.total = self.arrived = 0

    def result(self, *, done: bool, changed: bool) -> dict[str, Any]:
        """Return what the module returns."""
        commit = self.source.commit or self.wanted
        return {
            "done": done,
            "changed": changed,
            "path": str(self.home / commit) if commit else "",
            "revision": commit,
            "bytes_total": self.total,
            "bytes_done": self.arrived,
            "bytes_received": self.source.received,
        }

    def run(self, *, check_mode: bool) -> dict[str, Any]:
        """Do the work, or in check mode only look; return what the module returns; raises Problem."""
        if in_place(self.home, self.wanted):
            return self.result(done=True, changed=False)
        entries = check_entries(self.source.entries())
        check_commit(self.source, self.wanted)
        self.total = sum(entry.size for entry in entries)
        incoming = self.home / f"{self.source.key}{INCOMING}"
        if check_mode:
            return self.predict(entries, incoming)
        self.home.mkdir(parents=True, exist_ok=True)
        with alone(self.home):
            return self.bring(entries, incoming)

    def predict(self, entries: list[Entry], incoming: Path) -> dict[str, Any]:
        """Find out what bring() would come to, without writing anything."""
        if not self.source.commit:
            self.source.commit = commit_of({entry.path: digest(self.source.open(entry, 0)[0]) for entry in entries})
            check_commit(self.source, self.wanted)
        changed = not in_place(self.home, self.source.commit)
        if changed:
            check_space(entries, incoming)
        return self.result(done=True, changed=changed)

    def bring(self, entries: list[Entry], incoming: Path) -> dict[str, Any]:
        """Fetch what is missing; when nothing is, check it and put it in place."""
        if in_place(self.home, self.source.commit):
            return self.result(done=True, changed=False)
        check_space(entries, incoming)
        clock = Clock(self.seconds if self.source.sliced else math.inf)
        try:
            for entry in entries:
                if size_of(incoming / entry.path) != entry.size and not clock.over():
                    fetch(self.source, entry, incoming, clock)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise no_space(self.home, "it ran full") from error
        self.arrived = sum(held(entry, incoming) for entry in entries)
        # Then files are missing still, or there is no time left to check them.
        if clock.over():
            return self.result(done=False, changed=True)
        sums = check_digests(self.source, entries, incoming)
        self.source.commit = self.source.commit or commit_of(sums)
        check_commit(self.source, self.wanted)
        changed = not in_place(self.home, self.source.commit)
        if changed:
            put_in_place(sums, incoming, self.home / self.source.commit)
        else:
            shutil.rmtree(incoming)
        return self.result(done=True, changed=changed)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "hub": {"type": "str"},
            "repository": {"type": "str"},
            "token": {"type": "str", "no_log": True},
            "folder": {"type": "path"},
            "archive": {"type": "path"},
            "revision": {"type": "str"},
            "home": {"type": "path", "required": True},
            "seconds": {"type": "int", "default": 15},
        },
        mutually_exclusive=[("hub", "folder", "archive")],
        required_one_of=[("hub", "folder", "archive")],
        required_by={"hub": ("repository", "revision")},
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        result = Call(module.params).run(check_mode=module.check_mode)
    except Problem as problem:
        module.fail_json(msg=f"{problem}.")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        module.fail_json(msg=f"The archive is damaged: {error}. Fix: copy it to the host anew.")
    except OSError as error:
        module.fail_json(msg=f"{error}. Fix: check the file system, of the root and of the source.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
