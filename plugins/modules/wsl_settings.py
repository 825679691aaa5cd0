#!/usr/bin/python
"""Ansible module wsl_settings: what WSL and Windows must be told so that a server runs in a distribution of WSL2."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: wsl_settings
short_description: Settings of a WSL distribution, inside it and in Windows
description:
  - Merges keys into C(/etc/wsl.conf) and, by way of interop, into C(.wslconfig) in the Windows user's profile. Other
    keys, comments, line ends and the byte order mark stay as they are.
  - Registers a task in Windows that starts the distribution when the user logs on, and updates WSL if it is too old.
    The task needs no administrator.
  - Remembers what was there before, so that O(state=absent) puts it back; what somebody changed since is left alone.
    What is no longer asked for is put back as well, but Windows is not asked at all unless O(windows) is given.
  - Checks everything that it can before it changes anything. It never shuts WSL down, which would end the play.
options:
  state: {description: Whether the settings are to be present., type: str, choices: [present, absent], default: present}
  conf: {description: "Keys for C(/etc/wsl.conf), by section.", type: dict, default: {}}
  windows:
    description: What to do in Windows; without it nothing.
    type: dict
    suboptions:
      config: {description: "Keys for C(.wslconfig), by section. Empty values are left out.", type: dict, default: {}}
      logon_task: {description: Whether the distribution starts when the user logs on., type: bool, default: true}
      distribution: {description: Name of the distribution; empty to ask WSL., type: str, default: ""}
      floor: {description: The oldest version of WSL that knows the keys; empty for any., type: str, default: ""}
      update:
        description: Whether an older WSL may be updated. Windows may end the distribution for it.
        type: bool
        default: false
attributes:
  check_mode: {description: Foresees what it would change., support: full}
  diff_mode: {description: Shows what changes in files., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Let systemd run, and the distribution stay
  dots_ocr.deploy.wsl_settings:
    conf:
      boot: {systemd: "true"}
    windows:
      config:
        general: {instanceIdleTimeout: "-1"}
        wsl2: {vmIdleTimeout: "-1"}
"""

RETURN = r"""
config_changed:
  description: Whether C(.wslconfig) was changed, which has effect once WSL was shut down.
  returned: success
  type: bool
task_changed: {description: Whether the task in Windows was registered or removed., returned: success, type: bool}
updated: {description: Whether WSL was updated., returned: success, type: bool}
windows:
  description: What was found in Windows, C({}) if it was not asked.
  returned: success
  type: dict
  sample: {config: /mnt/c/Users/me/.wslconfig, distribution: Ubuntu-24.04, task: dots-ocr-Ubuntu-24.04, user: PC\me}
"""

import codecs
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from ..module_utils.cards import version
from ..module_utils.common import RECORDS, Problem, answer, read, remove_empty, run, write

Keys = dict[str, dict[str, str]]
# What was set: {"created": the file is ours, "sections": {one that we added: whether an empty line came with it},
# "keys": {section: {key: {set, before}}}}.
Record = dict[str, Any]
# A file, what it holds, what it should hold (None is no file), and whether its first state is kept beside it.
Change = tuple[Path, "bytes | None", "bytes | None", bool]

RECORD = "wsl.json"
WSL_CONF = Path("/etc/wsl.conf")
BACKUP = ".before-dots-ocr"
TASK_PREFIX = "dots-ocr-"

SECTION = re.compile(r"^\s*\[([^\]]*)\]")
KEY = re.compile(r"^(\s*)([^\s=#\[][^=#]*?)(\s*=[ \t]*)([^#]*?)(\s*(?:#.*)?)$")
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Of .wslconfig: WSL ignores what it cannot read, with a message that nobody sees.
SIZE = re.compile(r"\d+ ?(?:[KMGT]?B)?", re.IGNORECASE)
SIZES = ("memory", "swap")

# Windows' own programs lie here below the drive; %SystemRoot% could be elsewhere, but is not.
SYSTEM = "Windows/System32"
TIMEOUT = 60  # seconds; Windows takes its time after a start
UPDATE_TIMEOUT = 900  # for a download of some 200 MB

AGAIN = "then in Windows: wsl --shutdown"
INTEROP_FIX = (
    f"remove enabled=false below [interop] in /etc/wsl.conf, {AGAIN}; or set wsl_manage_windows to false and do the"
    " Windows side by hand (docs/start/windows.md)"
)
AUTOMOUNT_FIX = f"remove enabled=false below [automount] in /etc/wsl.conf, {AGAIN}"

# Trigger and principal name the user: a trigger for any user takes an administrator.
TASK = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo>
    <Description>Starts the WSL distribution {distribution}, so that its services run (dots-ocr-deploy)</Description>
  </RegistrationInfo>
  <Triggers>
    <LogonTrigger><Enabled>true</Enabled><UserId>{user}</UserId></LogonTrigger>
  </Triggers>
  <Principals>
    <Principal id="Author">
      <UserId>{user}</UserId><LogonType>InteractiveToken</LogonType><RunLevel>LeastPrivilege</RunLevel>
    </Principal>
  </Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <ExecutionTimeLimit>PT10M</ExecutionTimeLimit>
  </Settings>
  <Actions Context="Author">
    <Exec><Command>{command}</Command><Arguments>{arguments}</Arguments></Exec>
  </Actions>
</Task>
"""


class Text:
    """A file of settings in blocks, each the lines from one header to the next, with the encoding that it had."""

    def __init__(self, data: bytes, new_line: str = "\n") -> None:
        """Take a file apart; without contents it gets the line ends that are asked for."""
        self.mark, self.encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
        text = data[len(self.mark) :].decode(self.encoding, "surrogateescape")
        self.new_line = ("\r\n" if "\r\n" in text else "\n") if text else new_line
        self.ends = text.endswith("\n") or not text
        lines = text.replace("\r\n", "\n").split("\n")
        self.blocks: list[list[str]] = [[]]  # the first has no header
        for line in lines[:-1] if self.ends else lines:
            if SECTION.match(line):
                self.blocks.append([])
            self.blocks[-1].append(line)

    def data(self) -> bytes:
        """Return the file."""
        lines = [line for block in self.blocks for line in block]
        text = self.new_line.join(lines) + (self.new_line if self.ends and lines else "")
        return self.mark + text.encode(self.encoding, "surrogateescape")

    def section(self, name: str) -> list[list[str]]:
        """Return the blocks of a section; WSL does not mind the case of names."""
        headers = [(block, SECTION.match(block[0])) for block in self.blocks[1:]]
        return [block for block, header in headers if header and header[1].strip().lower() == name.lower()]

    def find(self, section: str, key: str) -> list[tuple[list[str], int, re.Match[str]]]:
        """Return every line that sets a key: its block, its number there, and its parts."""
        lines = [(block, number) for block in self.section(section) for number in range(1, len(block))]
        found = [(block, number, KEY.match(block[number])) for block, number in lines]
        return [(block, number, parts) for block, number, parts in found if parts and parts[2].lower() == key.lower()]

    def add(self, section: str, key: str, value: str) -> bool | None:
        """Add a key at the end of its section; return whether an empty line came with one that is new, else nothing."""
        apart = None
        if not self.section(section):
            apart = bool(self.blocks[-1] and self.blocks[-1][-1].strip())
            self.blocks[-1] += [""] * apart
            self.blocks.append([f"[{section}]"])
        block = self.section(section)[-1]
        last = max(number for number, line in enumerate(block) if line.strip())
        block.insert(last + 1, f"{key}={value}")
        return apart


def with_value(parts: re.Match[str], value: str) -> str:
    """Return a line with another value of its key, and all around it as it was."""
    return f"{parts[1]}{parts[2]}{parts[3]}{value}{parts[5]}"


def merge(text: Text, keys: Keys, record: Record) -> None:
    """Give the keys their values, put back those of the record that are not among them, and write the record on."""
    for section, known in list(record.get("keys", {}).items()):
        for key in [name for name in known if name not in keys.get(section, {})]:
            put_back(text, section, key, known.pop(key))
        if not known:
            del record["keys"][section]
            tidy(text, section, record)
    for section, wanted in keys.items():
        for key, value in wanted.items():
            found = text.find(section, key)
            if found and all(parts[4] == value for _, _, parts in found):
                continue
            known = record.setdefault("keys", {}).setdefault(section, {})
            before = known.get(key, {}).get("before", [parts[4] for _, _, parts in found])
            known[key] = {"set": value, "before": before}
            for block, number, parts in found:
                block[number] = with_value(parts, value)
            if not found and (apart := text.add(section, key, value)) is not None:
                record.setdefault("sections", {})[section] = apart


def put_back(text: Text, section: str, key: str, known: dict[str, Any]) -> None:
    """Give a key the values that it had before we came, or take it away; what somebody set since stays."""
    before = list(known["before"])
    for block, number, parts in reversed(text.find(section, key)):
        value = before.pop() if before else None
        if parts[4] == known["set"]:
            block[number : number + 1] = [] if value is None else [with_value(parts, value)]


def tidy(text: Text, section: str, record: Record) -> None:
    """Take away a section that we added, with the empty line before it, if nothing is left in it."""
    if section not in record.get("sections", {}):
        return
    apart, blocks = record["sections"].pop(section), text.section(section)
    if len(blocks) == 1 and not any(line.strip() for line in blocks[0][1:]):
        place = next(number for number, block in enumerate(text.blocks) if block is blocks[0])
        above = text.blocks[place - 1]
        if apart and above and not above[-1].strip():
            del above[-1]
        above += text.blocks.pop(place)[1:]


def plan_file(path: Path, keys: Keys, record: Record, new_line: str) -> tuple[bytes | None, bytes | None]:
    """Return what a file holds and what it should hold, None being no file; writes on the record."""
    before = read(path)
    text = Text(before or b"", new_line)
    if before is None and keys:
        record["created"] = True
    merge(text, keys, record)
    if not any(text.blocks) and (before is None or record.get("created")):
        return before, None
    return before, text.data()


def write_file(path: Path, content: bytes | None, backup: bool) -> None:
    """Replace a file, or remove it. On a drive of Windows there may be no owners and modes to keep."""
    path = path.resolve()
    saved = path.with_name(path.name + BACKUP)
    if backup and path.exists() and not saved.exists():
        shutil.copyfile(path, saved)
    write(path, content, keep=True)


def decode(data: bytes) -> str:
    """Return what a program of Windows said: some write UTF-16, and all end their lines with CR LF."""
    if b"\0" in data:
        return data.removeprefix(codecs.BOM_UTF16_LE).decode("utf-16-le", "replace").replace("\r\n", "\n")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").replace("\r\n", "\n")


def line(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


class Windows:
    """The Windows around this distribution, by interop."""

    def __init__(self, distribution: str) -> None:
        """Find drive, user and profile; raises Problem if Windows cannot be reached."""
        self.drive = Path(self.path("-u", "C:\\"))
        if not self.drive.is_dir():
            raise Problem(f"the drive C: of Windows is not visible in WSL as {self.drive}", AUTOMOUNT_FIX)
        # With /u cmd.exe answers in UTF-16; otherwise an umlaut in a name would come in a code page nobody knows.
        answer = self.run("cmd.exe", "/u", "/d", "/c", "set", "USER")
        said = dict(entry.split("=", 1) for entry in answer.splitlines() if "=" in entry)
        if "USERPROFILE" not in said or "USERNAME" not in said:
            raise Problem(f"Windows does not report its user ({line(answer)})", INTEROP_FIX)
        self.user = f"{said['USERDOMAIN']}\\{said['USERNAME']}" if said.get("USERDOMAIN") else said["USERNAME"]
        self.profile = Path(self.path("-u", said["USERPROFILE"]))
        if not self.profile.is_dir():
            raise Problem(
                f"the Windows user's profile {said['USERPROFILE']} is not visible in WSL as {self.profile}",
                AUTOMOUNT_FIX,
            )
        self.config = self.profile / ".wslconfig"
        self.distribution = distribution or self.path("-w", "/").rstrip("\\").rsplit("\\", 1)[-1]
        if not re.fullmatch(r"[\w.-]+", self.distribution):
            raise Problem(
                f"'{self.distribution}' is no name of a distribution", "set wsl_distribution to what 'wsl --list' shows"
            )
        self.task = f"{TASK_PREFIX}{self.distribution}"

    def path(self, direction: str, path: str) -> str:
        """Translate a path: -u from Windows', -w to Windows'."""
        status, output, errors = run("wslpath", direction, path, timeout=TIMEOUT, decode=decode)
        if status < 0:
            raise Problem(f"wslpath does not work ({errors})", INTEROP_FIX)
        if status > 0:
            raise Problem(f"wslpath does not know {path} ({line(errors + output)})", AUTOMOUNT_FIX)
        return output.strip("\n")

    def attempt(self, program: str, *arguments: str, timeout: int = TIMEOUT) -> tuple[int, str]:
        """Run a program of Windows and return its exit status and all that it said; Problem if it cannot be run."""
        path = str(self.drive / SYSTEM / program)
        shared = ":".join(filter(None, [os.environ.get("WSLENV"), "WSL_UTF8"]))
        # The current folder must be one that Windows has a letter for.
        environment = {"WSL_UTF8": "1", "WSLENV": shared}
        status, output, errors = run(
            path, *arguments, timeout=timeout, cwd=self.drive, decode=decode, environment=environment
        )
        if "timed out" in errors and status < 0:
            raise Problem(f"{program} did not end within {timeout} s", "restart Windows, then run again")
        if status < 0:
            raise Problem(f"programs of Windows cannot be run from WSL ({path}: {errors})", INTEROP_FIX)
        return status, output + errors

    def run(
        self, program: str, *arguments: str, problem: str = "", fix: str = INTEROP_FIX, timeout: int = TIMEOUT
    ) -> str:
        """Run a program of Windows that must not fail, and return what it said; raises Problem with its words."""
        status, said = self.attempt(program, *arguments, timeout=timeout)
        if status != 0:
            raise Problem(f"{problem or f'{program} failed with status {status}'} ({line(said)})", fix)
        return said

    def starter(self) -> tuple[str, str]:
        """Return the command and the arguments that start the distribution, which then stays by its idle timeouts."""
        command = self.path("-w", str(self.drive / SYSTEM / "wsl.exe"))
        return command, f"-d {self.distribution} -u root --exec /bin/true"

    def starts(self) -> bool:
        """Tell whether the task is there and starts this distribution."""
        status, said = self.attempt("schtasks.exe", "/query", "/tn", self.task, "/xml")
        found = [re.search(rf"<{tag}>(.*?)</{tag}>", said, re.DOTALL) for tag in ("Command", "Arguments")]
        return status == 0 and tuple(unescape(tag[1]).strip() for tag in found if tag) == self.starter()

    def register(self) -> None:
        """Register the task. An XML file spares all quoting; schtasks wants it in UTF-16."""
        command, arguments = self.starter()
        values = {"distribution": self.distribution, "user": self.user, "command": command, "arguments": arguments}
        text = TASK.format(**{name: escape(value) for name, value in values.items()})
        file = self.profile / ".dots-ocr-task.xml"
        try:
            file.write_bytes(codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"))
            words = ("/create", "/tn", self.task, "/xml", self.path("-w", str(file)), "/f")
            fix = "create it by hand (docs/start/windows.md) and set wsl_logon_task to false"
            self.run("schtasks.exe", *words, problem=f"Windows refuses the task {self.task}", fix=fix)
        finally:
            file.unlink(missing_ok=True)


def installed_wsl() -> str:
    """Return the version of WSL, or nothing if it does not tell."""
    status, output, _ = run("wslinfo", "--wsl-version", timeout=TIMEOUT, decode=decode)
    return output.strip() if status == 0 else ""


def check_wishes(wishes: dict[str, Any]) -> bool:
    """Return whether WSL must be updated; raises Problem for what WSL would not understand."""
    for key in SIZES:
        value = wishes["config"].get("wsl2", {}).get(key)
        if value and not SIZE.fullmatch(str(value)):
            raise Problem(f"wsl_{key} is '{value}', which WSL does not understand", f"write wsl_{key}: 24GB, say")
    found = installed_wsl()
    if not found or not wishes["floor"] or version(found)[:3] >= version(wishes["floor"])[:3]:
        return False
    if not wishes["update"]:
        raise Problem(
            f"WSL is {found}; only {wishes['floor']} and newer can be told not to put an idle distribution to sleep",
            "in Windows: wsl --update, then wsl --shutdown; or set wsl_update to true",
        )
    return True


def clean(keys: dict[str, Any]) -> Keys:
    """Return the keys that have a value, as text."""
    text = {
        section: {key: str(value) for key, value in found.items() if value not in ("", None)}
        for section, found in keys.items()
    }
    return {section: found for section, found in text.items() if found}


def forget_if_empty(record: Record) -> Record:
    """Return a record of a file, empty if nothing in the file is ours."""
    return {name: value for name, value in record.items() if value} if record.get("keys") else {}


def apply(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Do what is asked, unless it is only to be foreseen. Everything that can be refused is refused first."""
    record: dict[str, Any] = json.loads(read(RECORDS / RECORD) or "{}")
    absent, wishes, touched = params["state"] == "absent", params["windows"], record.get("windows", {})
    asked = bool(touched) if absent else wishes is not None
    update = check_wishes(wishes) if asked and not absent else False
    windows = Windows(touched.get("distribution", "") if absent else wishes["distribution"]) if asked else None
    conf: Record = record.get("conf", {})
    files: list[Change] = [(WSL_CONF, *plan_file(WSL_CONF, {} if absent else clean(params["conf"]), conf, "\n"), False)]
    record["conf"] = forget_if_empty(conf)
    result: dict[str, Any] = {"config_changed": False, "task_changed": False, "updated": update, "windows": {}}
    task, register, unregister = touched.get("task", ""), False, False
    if windows:
        config: Record = touched.get("config", {})
        path = Path(touched.get("path", windows.config))
        files.append((path, *plan_file(path, {} if absent else clean(wishes["config"]), config, "\r\n"), not absent))
        wanted = not absent and wishes["logon_task"]
        register = wanted and not windows.starts()
        # A task of another name is that of a distribution before it was renamed.
        unregister = bool(task) and (not wanted or task != windows.task)
        unregister = unregister and windows.attempt("schtasks.exe", "/query", "/tn", task)[0] == 0
        kept = {"config": forget_if_empty(config), "task": windows.task if wanted and (register or task) else ""}
        where = {"path": str(path), "distribution": windows.distribution}
        record["windows"] = {**kept, **where} if any(kept.values()) else {}
        found = {"distribution": windows.distribution, "task": windows.task, "user": windows.user}
        result["windows"] = {"config": str(windows.config), **found}
        result["config_changed"] = files[-1][1] != files[-1][2]
        result["task_changed"] = register or unregister
    changes = [change for change in files if change[1] != change[2]]
    result["changed"] = update or register or unregister or bool(changes)
    result["diff"] = []
    for file, *contents, _ in changes:
        old, new = ((data or b"").decode("utf-8", "replace") for data in contents)
        result["diff"].append({"before_header": str(file), "after_header": str(file), "before": old, "after": new})
    if check:
        return result
    # Written before the changes, so that what is half done can be put back; after them, if it says that all is.
    if not absent:
        write_record(record)
    if windows and unregister:
        problem = f"Windows does not remove the task {task}"
        fix = f"in Windows: schtasks /delete /tn {task} /f, then run again"
        windows.run("schtasks.exe", "/delete", "/tn", task, "/f", problem=problem, fix=fix)
    if windows and register:
        windows.register()
    for file, _, after, backup in changes:
        write_file(file, after, backup)
    if windows and absent:
        config_file = files[-1][0].resolve()
        config_file.with_name(config_file.name + BACKUP).unlink(missing_ok=True)
    if absent:
        write_record(record)
    if windows and update:
        # At the very end: Windows may end this distribution for it.
        fix = "in Windows: wsl --update, then wsl --shutdown"
        windows.run("wsl.exe", "--update", problem="wsl.exe --update failed", fix=fix, timeout=UPDATE_TIMEOUT)
    return result


def write_record(record: dict[str, Any]) -> None:
    """Keep the record, or remove it and the folders that it was the last in."""
    text = json.dumps(record, indent=2, sort_keys=True) + "\n" if any(record.values()) else None
    write(RECORDS / RECORD, text)
    remove_empty(RECORDS, RECORDS.parent)


def main() -> None:
    """Run the module."""
    options = {
        "state": {"choices": ["present", "absent"], "default": "present"},
        "conf": {"type": "dict", "default": {}},
        "windows": {
            "type": "dict",
            "options": {
                "config": {"type": "dict", "default": {}},
                "logon_task": {"type": "bool", "default": True},
                "distribution": {"default": ""},
                "floor": {"default": ""},
                "update": {"type": "bool", "default": False},
            },
        },
    }
    answer(options, apply)


if __name__ == "__main__":
    main()
