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
  - Restarts nothing; C(restart) tells that the engine has to be.
  - Absent takes exactly this away again.
options:
  state:
    description: Whether our configuration shall be there.
    type: str
    choices: [present, absent]
    default: present
  required:
    description: Options that must have these values.
    type: dict
    default: {}
  defaults:
    description: Groups of options; a group is set only where none of its options is.
    type: list
    elements: dict
    default: []
  options:
    description: Further options.
    type: dict
    default: {}
  proxy:
    description: Proxy of the engine, as C(http), C(https) and C(no_proxy).
    type: dict
    default: {}
    options:
      http:
        description: For addresses with http.
        type: str
      https:
        description: For addresses with https.
        type: str
      no_proxy:
        description: Where no proxy is used, separated by commas.
        type: str
  registry_ca:
    description: Certificate of the authority (PEM), or its path on the host, of each registry as C(HOST:PORT).
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
"""

EXAMPLES = r"""
- name: Configure Docker Engine
  docker_daemon:
    required:
      live-restore: false
    defaults:
      - log-driver: local
        log-opts: {max-size: 50m}
    options:
      insecure-registries: [mirror:5000]
"""

RETURN = r"""
restart:
  description: Whether the engine has to be restarted to know the configuration.
  returned: always
  type: bool
"""

import json
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DAEMON = Path("/etc/docker/daemon.json")
PROXY = Path("/etc/systemd/system/docker.service.d/dots-ocr-proxy.conf")
CERTIFICATES = Path("/etc/docker/certs.d")
CERTIFICATE = "dots-ocr.crt"
UNITS = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"), Path("/etc/systemd/system"))

Options = dict[str, Any]


class ConfigError(Exception):
    """The configuration cannot be what is asked for; the message names the cause and the cure."""


def parse(text: str) -> Options:
    """Return the options of a daemon.json; an empty file has none.

    Raises:
        ConfigError: it is not JSON, or no object.
    """
    cure = f"mend it or move it away; 'python3 -m json.tool {DAEMON}' shows the place"
    try:
        options = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ConfigError(f"{DAEMON} is not valid JSON ({error}), so nothing was changed. Cure: {cure}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{DAEMON} is not a JSON object, so nothing was changed. Cure: {cure}")
    return options


def combine(base: Options, top: Options) -> Options:
    """Return base with top laid over it, objects merged key by key."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = combine(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def merge(existing: Options, required: Options, defaults: list[Options], options: Options) -> Options:
    """Return what daemon.json shall hold.

    Raises:
        ConfigError: options contradict what is required.
    """
    contradicted = [key for key in required if combine(required, options)[key] != combine(options, required)[key]]
    if contradicted:
        raise ConfigError(
            f"docker_engine_daemon_options sets {contradicted[0]}, which has to be"
            f" {json.dumps(required[contradicted[0]])} here. Cure: leave it out; the role's README says why"
        )
    merged = dict(existing)
    for group in defaults:
        if not any(key in {**existing, **options} for key in group):
            merged |= group
    return combine(combine(merged, required), options)


def subtract(existing: Options, ours: Options) -> Options:
    """Return existing without the options that have our values; objects that become empty go too."""
    left = {}
    for key, value in existing.items():
        if key not in ours:
            left[key] = value
        elif isinstance(value, dict) and isinstance(ours[key], dict):
            if inner := subtract(value, ours[key]):
                left[key] = inner
        elif value != ours[key]:
            left[key] = value
    return left


def flags_of(unit: str) -> set[str]:
    """Return the options that the last command line of a unit, with its drop-ins, gives as flags."""
    starts = re.findall(r"(?m)^ExecStart=(.+)", unit.replace("\\\n", " "))
    if not starts:
        return set()
    words = starts[-1].split()
    # Options that may be repeated have a plural name in the file.
    plural = {
        "host": "hosts",
        "H": "hosts",
        "insecure-registry": "insecure-registries",
        "label": "labels",
        "registry-mirror": "registry-mirrors",
        "storage-opt": "storage-opts",
        "exec-opt": "exec-opts",
    }
    names = [match[1] for word in words if (match := re.match(r"--?([A-Za-z-]+)", word))]
    return {plural.get(name, name) for name in names}


def check(options: Options, flags: set[str], wsl: bool) -> None:
    """Check what the engine itself does not check.

    Raises:
        ConfigError: an option is given twice, or cuts WSL off.
    """
    twice = sorted(flags & set(options))
    if twice:
        raise ConfigError(
            f"{twice[0]} is set in {DAEMON} and as a flag of docker.service, so the engine would not start. Cure:"
            " remove one of both; 'systemctl cat docker.service' shows the flag"
        )
    if wsl and options.get("userland-proxy") is False:
        raise ConfigError(
            "userland-proxy is false, and on WSL Windows could not reach published ports with mirrored networking."
            f" Cure: remove it from {DAEMON} and from docker_engine_daemon_options"
        )


def render_proxy(proxy: Options) -> str | None:
    """Return the drop-in that gives the engine its proxy, or None without one."""
    names = (("http", "HTTP_PROXY"), ("https", "HTTPS_PROXY"), ("no_proxy", "NO_PROXY"))
    lines = [f'Environment="{name}={proxy[key]}"'.replace("%", "%%") for key, name in names if proxy.get(key)]
    return "\n".join(["# Written by Ansible (module docker_daemon).", "[Service]", *lines, ""]) if lines else None


class Configuration:
    """The configuration on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take what is wanted."""
        self.module = module
        self.params = module.params
        self.changed = False

    def present(self) -> bool:
        """Bring our configuration; return whether the engine has to be restarted."""
        existing = parse(DAEMON.read_text() if DAEMON.exists() else "")
        required, defaults, options = (self.params[key] for key in ("required", "defaults", "options"))
        wanted = merge(existing, required, defaults, options)
        check(wanted, flags_of(self.unit()), is_wsl())
        certificates = {registry: self.certificate(registry) for registry in self.params["registry_ca"]}
        if wanted != existing:
            self.validate(wanted)
        restart = wanted != existing and self.write(DAEMON, render(wanted))
        restart |= self.write(PROXY, render_proxy(self.params["proxy"]), 0o600)
        for place in [*CERTIFICATES.glob(f"*/{CERTIFICATE}")]:
            if place.parent.name not in certificates:
                self.write(place, None)
        for registry, text in certificates.items():
            self.write(CERTIFICATES / registry / CERTIFICATE, text)
        return restart

    def absent(self) -> bool:
        """Take our configuration away."""
        ours = combine(self.params["required"], self.params["options"])
        for group in self.params["defaults"]:
            ours = combine(group, ours)
        restart = False
        if DAEMON.exists():
            existing = parse(DAEMON.read_text())
            left = subtract(existing, ours)
            restart = left != existing and self.write(DAEMON, render(left) if left else None)
        restart |= self.write(PROXY, None)
        for place in [*CERTIFICATES.glob(f"*/{CERTIFICATE}")]:
            self.write(place, None)
        return restart

    def certificate(self, registry: str) -> str:
        """Return the certificate for a registry.

        Raises:
            ConfigError: there is none.
        """
        given = str(self.params["registry_ca"][registry])
        try:
            text = Path(given).read_text() if given.startswith("/") else given
        except OSError as error:
            raise ConfigError(
                f"cannot read {given} for {registry}: {error.strerror}. Cure: correct the path"
            ) from error
        if "-----BEGIN CERTIFICATE-----" not in text:
            raise ConfigError(
                f"what is given for {registry} is no certificate in PEM. Cure: give the certificate of its authority"
            )
        return text.rstrip() + "\n"

    def unit(self) -> str:
        """Return the text of docker.service with its drop-ins, in the order in which systemd reads them."""
        files = [folder / "docker.service" for folder in UNITS if (folder / "docker.service").is_file()]
        drop_ins = [file for folder in UNITS for file in sorted((folder / "docker.service.d").glob("*.conf"))]
        return "\n".join(file.read_text() for file in [*files[-1:], *drop_ins])

    def validate(self, options: Options) -> None:
        """Let the engine check the options, if it is there.

        Raises:
            ConfigError: it would not start with them.
        """
        program = shutil.which("dockerd", path="/usr/bin:/usr/sbin:/usr/local/bin")
        if program is None:
            return
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(render(options))
            file.flush()
            status, output, errors = self.module.run_command([program, "--validate", "--config-file", file.name])
        if status != 0:
            words = " ".join((output + errors).replace(file.name, str(DAEMON)).split())
            raise ConfigError(
                f"the engine refuses the options: {words}. Nothing was changed. Cure: correct"
                f" docker_engine_daemon_options, or {DAEMON} if the option is there"
            )

    def write(self, path: Path, content: str | None, mode: int = 0o644) -> bool:
        """Write a file in one go, or remove it, and folders that become empty; tell whether that changes it."""
        if (path.read_text() if path.exists() else None) == content:
            return False
        self.changed = True
        if self.module.check_mode:
            return True
        if content is None:
            path.unlink()
            for folder in path.parents[:3]:
                if folder != Path("/etc") and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        else:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            growing = path.with_name(f".{path.name}.new")
            growing.touch(mode)
            growing.chmod(mode)
            growing.write_text(content)
            growing.replace(path)
        return True


def render(options: Options) -> str:
    """Return the text of a daemon.json."""
    return json.dumps(options, indent=2, sort_keys=True) + "\n"


def is_wsl() -> bool:
    """Tell whether this is WSL."""
    return "microsoft" in platform.release().lower() or Path("/run/WSL").is_dir()


def main() -> None:
    """Run the module."""
    # An address may have a password in it.
    address = {"type": "str", "no_log": True}
    options = {"type": "dict", "default": {}}
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "required": options,
            "defaults": {"type": "list", "elements": "dict", "default": []},
            "options": options,
            "proxy": {**options, "options": {"http": address, "https": address, "no_proxy": {"type": "str"}}},
            "registry_ca": options,
        },
        supports_check_mode=True,
    )
    configuration = Configuration(module)
    try:
        restart = configuration.present() if module.params["state"] == "present" else configuration.absent()
    except ConfigError as error:
        module.fail_json(msg=f"{error}.")
    module.exit_json(changed=configuration.changed, restart=restart)


if __name__ == "__main__":
    main()
