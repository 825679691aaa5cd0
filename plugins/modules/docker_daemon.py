#!/usr/bin/python
"""Ansible module docker_daemon: the configuration of Docker Engine, merged with what others wrote."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: docker_daemon
short_description: Configure Docker Engine without touching what others configured
description:
  - Merges options into C(/etc/docker/daemon.json), lets the engine itself check the result before it is written, and
    writes a drop-in for a proxy and certificates of registries.
  - What others wrote stays, and so do mode, owner and a link in the file's place. A list that both have is joined, ours
    first.
  - Restarts nothing; C(restart) tells that the engine has to be.
  - Absent takes exactly this away again. What stood there before comes back, so it is kept in
    C(/var/lib/dots-ocr/installed/docker-daemon.json), which only root reads.
options:
  state:
    description: Whether our configuration is to be present.
    type: str
    choices: [present, absent]
    default: present
  required: {description: Options that must have these values., type: dict, default: {}}
  defaults:
    description: Groups of options; a group is set only where none of its options is.
    type: list
    elements: dict
    default: []
  options: {description: Further options., type: dict, default: {}}
  proxy:
    description: Proxy of the engine, as C(http), C(https) and C(no_proxy).
    type: dict
    default: {}
    suboptions:
      http: {description: For addresses with http., type: str}
      https: {description: For addresses with https., type: str}
      no_proxy: {description: "Where no proxy is used, separated by commas.", type: str}
  registry_ca:
    description: Certificate of the authority (PEM), or its path on the host, of each registry as C(HOST:PORT).
    type: dict
    default: {}
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Configure Docker Engine
  dots_ocr.deploy.docker_daemon:
    required:
      live-restore: false
    defaults:
      - log-driver: local
        log-opts: {max-size: 50m}
    options:
      insecure-registries: [mirror:5000]
"""

RETURN = r"""
restart: {description: Whether the engine has to be restarted to know the configuration., returned: always, type: bool}
"""

import base64
import json
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ..module_utils.common import RECORDS, Problem, answer, begun, read, remove_empty, run, write
from ..module_utils.engine import DAEMON, PLACES, UNFIT

RECORD = RECORDS / "docker-daemon.json"
PROXY = Path("/etc/systemd/system/docker.service.d/dots-ocr-proxy.conf")
CERTIFICATES = Path("/etc/docker/certs.d")
CERTIFICATE = "dots-ocr.crt"
UNITS = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"), Path("/etc/systemd/system"))

Options = dict[str, Any]


def parse(data: bytes | None) -> Options:
    """Return the options in the bytes of a daemon.json as dockerd reads them; no file, an empty one and null have none.

    Like dockerd it takes UTF-8, or what a byte order mark says, and merges objects whose key stands there twice.
    """
    what = "valid JSON"
    try:
        text = data if data and data.strip() else b"null"
        options = json.loads(text, object_pairs_hook=merge_pairs, parse_constant=refuse_constant)
        if options is None or isinstance(options, dict):
            return options or {}
        what, why = "a JSON object", ""
    except ValueError as error:
        why = f" ({error})"
    raise Problem(
        f"{DAEMON} is not {what}{why}, so nothing was changed",
        f"correct it or move it away; 'python3 -m json.tool {DAEMON}' shows the place",
    )


def merge_pairs(pairs: list[tuple[str, Any]]) -> Options:
    """Return an object of JSON; of a key that stands there twice the last counts, objects are merged."""
    merged: Options = {}
    for key, value in pairs:
        merged = combine(merged, {key: value})
    return merged


def refuse_constant(name: str) -> None:
    """Refuse what only Python takes for JSON."""
    raise ValueError(f"{name} is not JSON")


def combine(base: Options, top: Options, *, join: bool = False) -> Options:
    """Return base with top laid over it, objects merged key by key; with join, lists of words are joined too."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = combine(below, value, join=join)
        elif join and is_list_of_words(below) and is_list_of_words(value):
            merged[key] = value + [word for word in below if word not in value]
        else:
            merged[key] = value
    return merged


def is_list_of_words(value: Any) -> bool:
    """Tell whether a value is a list of words, such as that of registries."""
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def merge(existing: Options, required: Options, defaults: list[Options], options: Options) -> Options:
    """Return what daemon.json should hold."""
    contradicted = [key for key in required if combine(required, options)[key] != combine(options, required)[key]]
    if contradicted:
        value = json.dumps(required[contradicted[0]])
        raise Problem(
            f"docker_engine_daemon_options sets {contradicted[0]}, which has to be {value} here",
            "leave it out; the role's README says why",
        )
    merged = dict(existing)
    for group in defaults:
        if not any(key in {**existing, **options} for key in group):
            merged |= group
    return combine(combine(merged, required), options, join=True)


def restore(existing: Options, written: Options, before: Options) -> Options:
    """Return existing as it would be had we never written: what still has our value gets the one of before."""
    left = {}
    for key, value in existing.items():
        ours, old = written.get(key), before.get(key)
        if key not in written:
            left[key] = value
        elif value == ours:
            if key in before:
                left[key] = old
        elif isinstance(value, dict) and isinstance(ours, dict):
            inner = restore(value, ours, old if isinstance(old, dict) else {})
            if inner or key in before:
                left[key] = inner
        elif is_list_of_words(value) and is_list_of_words(ours):
            words = [word for word in value if word not in ours or word in (old or [])]
            if words or key in before:
                left[key] = words
        else:
            left[key] = value
    return left


def flags_of(unit: str) -> set[str]:
    """Return the options that the last command line of a unit, with its drop-ins, gives as flags."""
    starts = re.findall(r"(?m)^ExecStart=(.+)", unit.replace("\\\n", " "))
    if not starts:
        return set()
    words = re.sub(rf"--config-file[= ]{DAEMON}(?=\s|$)", "", starts[-1]).split()
    # Options that may be repeated have a plural name in the file.
    plural = {name: f"{name}s" for name in ("host", "label", "registry-mirror", "storage-opt", "exec-opt")}
    plural |= {"H": "hosts", "insecure-registry": "insecure-registries"}
    names = [match[1] for word in words if (match := re.match(r"--?([A-Za-z-]+)", word))]
    return {plural.get(name, name) for name in names}


def check(options: Options, flags: set[str], wsl: bool) -> None:
    """Check what the engine itself does not check."""
    # Names with a dot or a slash are programs that need no definition (containerd's shims).
    runtime, runtimes = options.get("default-runtime"), options.get("runtimes")
    known = not runtime or "add-runtime" in flags or bool(re.search(r"^runc$|[./]", str(runtime)))
    known |= isinstance(runtimes, dict) and runtime in runtimes
    no_proxy = options.get("userland-proxy") is False
    twice = sorted(flags & set(options))
    either = f"{DAEMON} or docker_engine_daemon_options"
    for found, cause, fix in (
        (
            "config-file" in flags,
            f"docker.service reads its options from a file of its own (flag config-file), not from {DAEMON}",
            f"move them to {DAEMON} and remove the flag; 'systemctl cat docker.service' shows it",
        ),
        (
            options.get("userns-remap") or "userns-remap" in flags,
            "userns-remap is on, so the container could neither read its key nor write its cache. Nothing was changed",
            UNFIT["userns"][1],
        ),
        (
            options.get("iptables") is False and no_proxy,
            "iptables and userland-proxy are both false, so that nobody could reach the server's port. Nothing was"
            " changed",
            f"remove one of both from {either}",
        ),
        (
            not known,
            f"default-runtime is {runtime}, which runtimes does not define, so the engine would not start",
            f"remove default-runtime from {either}; GPUs come through CDI, without it",
        ),
        (
            twice,
            f"{', '.join(twice)} is set in {DAEMON} and as a flag of docker.service, so the engine would not start",
            "remove one of both; 'systemctl cat docker.service' shows the flag",
        ),
        (
            wsl and no_proxy,
            "userland-proxy is false, and on WSL Windows could not reach published ports with mirrored networking",
            f"remove it from {either}",
        ),
    ):
        if found:
            raise Problem(cause, fix)


def render_proxy(proxy: Options) -> str | None:
    """Return the drop-in that gives the engine its proxy, or None without one."""
    names = (("http", "HTTP_PROXY"), ("https", "HTTPS_PROXY"), ("no_proxy", "NO_PROXY"))
    lines = [f'Environment="{name}={proxy[key]}"'.replace("%", "%%") for key, name in names if proxy.get(key)]
    return "\n".join(["# Written by Ansible (module docker_daemon).", "[Service]", *lines, ""]) if lines else None


class Configuration:
    """The configuration on this host."""

    def __init__(self, params: Options, check: bool) -> None:
        """Take what is wanted, and whether it is only to be foreseen."""
        self.params = params
        self.check = check
        self.changed = False

    def present(self) -> bool:
        """Bring our configuration; return whether the engine has to be restarted."""
        data = read(DAEMON)
        existing, before = parse(data), self.before(data)
        required, defaults, options = (self.params[key] for key in ("required", "defaults", "options"))
        wanted = merge(parse(before), required, defaults, options)
        check(wanted, flags_of(unit()), "microsoft" in platform.release().lower() or Path("/run/WSL").is_dir())
        certificates = {registry: self.certificate(registry) for registry in self.params["registry_ca"]}
        if wanted != existing:
            validate(wanted)
        # First what absent needs: without it, what was there before would be lost by a run that is cut off here.
        kept = None if before is None else base64.b64encode(before).decode()
        proxy = render_proxy(self.params["proxy"])
        restart = wanted != existing or read(PROXY) != (proxy and proxy.encode())
        # The engine may not know what an earlier run wrote, which was cut off. What others wrote since is their affair.
        since = time.time() if restart else json.loads(read(RECORD) or b"{}").get("since", 0)
        self.write(RECORD, render({"before": kept, "written": wanted, **({"since": since} if since else {})}), 0o600)
        if wanted != existing:
            self.write(DAEMON, render(wanted))
        self.write_others(proxy, certificates)
        return restart or begun("docker.service").get("docker.service", since) < since <= time.time()

    def absent(self) -> bool:
        """Take our configuration away."""
        data = read(DAEMON)
        before = self.before(data)
        restart = before != data and parse(before) != parse(data)
        self.write(DAEMON, before)
        self.write(RECORD, None)
        return self.write_others(None, {}) or restart

    def write_others(self, proxy: str | None, certificates: dict[str, str]) -> bool:
        """Write or remove the drop-in and the certificates; return whether the engine has to be restarted for it."""
        there = {place.parent.name for place in CERTIFICATES.glob(f"*/{CERTIFICATE}")}
        for registry in there | set(certificates):
            self.write(CERTIFICATES / registry / CERTIFICATE, certificates.get(registry))
        return self.write(PROXY, proxy, 0o600)

    def before(self, data: bytes | None) -> bytes | None:
        """Return the daemon.json that would be there without us: that of before, with what others changed since."""
        kept = read(RECORD)
        if data is None or kept is None:
            return data
        record = json.loads(kept)
        before = None if record["before"] is None else base64.b64decode(record["before"])
        left = restore(parse(data), record["written"], parse(before))
        return before if left == parse(before) else render(left)

    def certificate(self, registry: str) -> str:
        """Return the certificate for a registry."""
        given = str(self.params["registry_ca"][registry])
        try:
            text = Path(given).read_text() if given.startswith("/") else given
        except OSError as error:
            raise Problem(f"cannot read {given} for {registry}: {error.strerror}", "correct the path") from error
        if "-----BEGIN CERTIFICATE-----" not in text:
            raise Problem(
                f"what is given for {registry} is no certificate in PEM", "give the certificate of its authority"
            )
        return text.rstrip() + "\n"

    def write(self, path: Path, content: bytes | str | None, mode: int = 0o644) -> bool:
        """Write a file, or remove it and folders that become empty; tell whether that changes it, in check mode too."""
        path = path.resolve()
        if not write(path, content, mode, keep=path == DAEMON.resolve(), real=not self.check):
            return False
        self.changed = True
        if content is None and not self.check:
            remove_empty(*(folder for folder in path.parents[:3] if folder != Path("/etc")))
        return True


def unit() -> str:
    """Return the text of docker.service with its drop-ins, in the order in which systemd reads them."""
    files = [folder / "docker.service" for folder in UNITS if (folder / "docker.service").is_file()]
    drop_ins = [file for folder in UNITS for file in sorted((folder / "docker.service.d").glob("*.conf"))]
    return "\n".join(file.read_text() for file in [*files[-1:], *drop_ins])


def validate(options: Options) -> None:
    """Let the engine check the options, if it is there."""
    program = shutil.which("dockerd", path=PLACES)
    if program is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(render(options))
        file.flush()
        status, output, errors = run(program, "--validate", "--config-file", file.name)
    if status != 0:
        words = " ".join((output + errors).replace(file.name, str(DAEMON)).split())
        raise Problem(
            f"the engine refuses the options: {words}. Nothing was changed",
            f"correct docker_engine_daemon_options, or {DAEMON} if the option is there",
        )


def render(options: Options) -> bytes:
    """Return a daemon.json."""
    # Half a character, which JSON can write as \uD800, is no UTF-8.
    return (json.dumps(options, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def main() -> None:
    """Run the module."""
    # An address may have a password in it.
    address = {"type": "str", "no_log": True}
    words = {"http": address, "https": address, "no_proxy": {"type": "str"}}
    # An empty object for each: Ansible fills the one of proxy, and would fill those that share it.
    options = {
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "required": {"type": "dict", "default": {}},
        "defaults": {"type": "list", "elements": "dict", "default": []},
        "options": {"type": "dict", "default": {}},
        "proxy": {"type": "dict", "default": {}, "options": words},
        "registry_ca": {"type": "dict", "default": {}},
    }

    def work(params: Options, check: bool) -> dict[str, Any]:
        configuration = Configuration(params, check)
        restart = configuration.present() if params["state"] == "present" else configuration.absent()
        return {"changed": configuration.changed, "restart": restart}

    answer(options, work)


if __name__ == "__main__":
    main()
