#!/usr/bin/python
"""Ansible module files: folders and files of a role, written together."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: files
short_description: Folders and files of a role, written together
description:
  - Does for a whole list what M(ansible.builtin.file) and M(ansible.builtin.copy) do one at a time. Twenty files cost
    one task instead of twenty, of two modules each.
  - What C(validate) refuses stops the task before anything has changed. Each file takes the place of the old one at
    once, with its owner and mode.
options:
  files:
    description: The folders and files, in the order in which they are made.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: Where it is., type: path, required: true}
      state:
        description: A file, a folder (its parents are made, too), or nothing.
        type: str
        choices: [file, directory, absent]
        default: file
      content:
        description: What is in the file. Without this and the other options that tell it, the file has to be there, and
          only its owner and mode are ensured.
        type: str
      src:
        description: File of the controller with the content, looked for as M(ansible.builtin.copy) does; or a folder,
          whose files come below O(files[].path).
        type: str
      template: {description: "Template of the controller, looked for as M(ansible.builtin.template) does.", type: str}
      vars: {description: Variables for the template beside those of the task., type: dict}
      base64: {description: "The content, as the controller sends what it has read.", type: str}
      secret: {description: "The content, to be shown nowhere.", type: str}
      copy_of: {description: "File of the host with the content, to be shown nowhere.", type: path}
      token:
        description: The content of a file that is missing, C(%s) being a random secret. A file that is there stays.
        type: str
      affects:
        description: What has to take a change of this over, such as the names of units.
        type: list
        elements: str
        default: []
      owner: {description: "Owner, if not that of the task.", type: str}
      group: {description: "Group, if not that of the task.", type: str}
      mode: {description: Mode; 0644 for files and 0755 for folders., type: raw}
      validate: {description: "Command that accepts the content; C(%s) is the file to check.", type: str}
  owner: {description: Owner of all of them; without it the one that they have., type: str}
  group: {description: Group of all of them; without it the one that they have., type: str}
attributes:
  check_mode: {description: Foresees what it would change., support: full}
  diff_mode: {description: Shows what changes in files., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Install the units
  dots_ocr.deploy.files:
    owner: root
    group: root
    files:
      - path: /etc/example
        state: directory
      - path: /etc/example/settings.json
        content: "{{ settings | to_nice_json }}"
        mode: "0640"
      - path: /etc/example/key
        token: "%s\n"
        mode: "0600"
      - path: /etc/systemd/system/example.service
        template: example.service.j2
        affects: [example.service]
  register: written

- name: Restart what they change
  ansible.builtin.systemd_service:
    name: "{{ item }}"
    state: restarted
    daemon_reload: true
  loop: "{{ written.affected }}"
"""

RETURN = r"""
paths: {description: "What has changed, or would change.", returned: success, type: list, elements: str}
affected:
  description:
    - What has to take over what has changed, each once; a unit of systemd also if it has run since before such a file
      was written.
  returned: success
  type: list
  elements: str
"""

import base64
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.common import begun, is_newer, run, write

MODES = {"file": "0644", "directory": "0755"}


def kind_of(path: Path) -> str:
    """Return what is there: file, directory, link (to nothing, or to a file), or absent."""
    if path.is_dir():
        return "directory"
    if path.is_symlink():
        return "link"
    return "file" if path.exists() else "absent"


class Entry:
    """One file or folder of the task."""

    def __init__(self, module: AnsibleModule, wanted: dict[str, Any]) -> None:
        """Remember what is wanted; the task's owner and group are the default."""
        self.module = module
        self.path = Path(wanted["path"])
        self.state: str = wanted["state"]
        self.hidden = any(wanted[name] is not None for name in ("secret", "copy_of", "token"))
        self.content = self.wanted_content(wanted)
        self.validate: str | None = wanted["validate"]
        self.affects: list[str] = wanted["affects"]
        self.owner = wanted["owner"] or module.params["owner"]
        self.group = wanted["group"] or module.params["group"]
        self.mode = wanted["mode"] or MODES.get(self.state)
        self.diff: dict[str, Any] = {"before": {}, "after": {}}

    def wanted_content(self, wanted: dict[str, Any]) -> bytes | None:
        """Return what should be in the file; nothing where any content will do."""
        if self.state != "file":
            return None
        if wanted["base64"] is not None:
            return base64.b64decode(wanted["base64"])
        if wanted["copy_of"] is not None:
            try:
                return Path(wanted["copy_of"]).read_bytes()
            except OSError as error:
                self.fail(f"{wanted['copy_of']} cannot be read: {error.strerror}. Fix: bring it to this host first.")
        text = wanted["content"] if wanted["secret"] is None else wanted["secret"]
        if wanted["token"] is not None and kind_of(self.path) == "absent":
            text = wanted["token"].replace("%s", secrets.token_urlsafe(32))
        return None if text is None else text.encode()

    def fail(self, problem: str, **details: Any) -> NoReturn:
        """End the task without telling what is in the files."""
        self.module.fail_json(msg=problem, invocation=asked(self.module), **details)
        raise SystemExit(1)

    def check(self) -> None:
        """End the task if this can't be made, or if its command refuses the content."""
        kind = kind_of(self.path)
        if self.state == "file" and kind == "directory":
            self.fail(f"{self.path} is a folder. Fix: move it away, then run this again.")
        if self.state == "directory" and kind in ("file", "link"):
            self.fail(f"{self.path} is not a folder. Fix: move it away, then run this again.")
        if self.state == "file" and self.content is None and kind == "absent" and not self.module.check_mode:
            self.fail(f"{self.path} is missing. Fix: create it, then run this again.")
        if not self.validate or self.content is None or (kind == "file" and self.path.read_bytes() == self.content):
            return
        file = Path(self.module.tmpdir, self.path.name)
        file.write_bytes(self.content)
        status, output, errors = run(*(word.replace("%s", str(file)) for word in shlex.split(self.validate)))
        if status != 0:
            command = self.validate.replace("%s", str(self.path))
            problem = f"'{command}' refuses the new content, and nothing was replaced: {(errors or output).strip()}"
            self.fail(problem, rc=status, stdout=output, stderr=errors)

    def own(self, path: Path, diff: dict[str, Any]) -> bool:
        """Give a path its owner and mode; returns whether they differed, which the difference notes."""
        changed: bool = self.module.set_owner_if_different(str(path), self.owner, False, diff)
        changed = self.module.set_group_if_different(str(path), self.group, changed, diff)
        return bool(self.module.set_mode_if_different(str(path), self.mode, changed, diff))

    def make(self) -> bool:
        """Make it; returns whether there was anything to do."""
        kind = kind_of(self.path)
        if self.state == "absent":
            return self.remove(kind)
        if self.state == "directory":
            if kind == "absent":
                self.note("state", kind, "directory")
                if self.module.check_mode:
                    return True
                for missing in reversed([place for place in (self.path, *self.path.parents) if not place.exists()]):
                    missing.mkdir()
                    self.own(missing, self.diff)
            return self.own(self.path, self.diff) or kind == "absent"
        if self.content is None:
            return kind != "absent" and self.own(self.path, self.diff)
        before = self.path.read_bytes() if kind == "file" else None
        if before == self.content:
            return self.own(self.path, self.diff)
        self.diff = {
            "before": self.shown(before or b""),
            "after": self.shown(self.content),
            "before_header": str(self.path),
            "after_header": str(self.path),
        }
        if not self.module.check_mode:
            write(self.path, self.content, own=lambda path: self.own(path, {}))
        return True

    def shown(self, content: bytes) -> str:
        """Return a content for the eyes of whoever asked for differences."""
        if self.hidden or b"\0" in content:
            return f"({'secret' if self.hidden else 'binary'})\n" if content else ""
        return content.decode(errors="replace")

    def remove(self, kind: str) -> bool:
        """Remove what is there; a link goes, not what it names."""
        if kind == "absent":
            return False
        self.note("state", kind, "absent")
        if self.module.check_mode:
            return True
        if kind == "directory" and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()
        return True

    def note(self, what: str, before: str, after: str) -> None:
        """Say a difference that is not one of content."""
        self.diff = {"before": {"path": str(self.path), what: before}, "after": {"path": str(self.path), what: after}}


def asked(module: AnsibleModule) -> dict[str, Any]:
    """Return what Ansible may show of the arguments: nobody's secrets go where no difference was asked for."""
    return {"module_args": {"files": [wanted["path"] for wanted in module.params["files"]]}}


def main() -> None:
    """Check all, then make all."""
    entry = {
        "path": {"type": "path", "required": True},
        "state": {"type": "str", "choices": ["file", "directory", "absent"], "default": "file"},
        "content": {"type": "str"},
        "src": {"type": "str"},
        "template": {"type": "str"},
        "vars": {"type": "dict"},
        "base64": {"type": "str"},
        "secret": {"type": "str", "no_log": True},
        "copy_of": {"type": "path"},
        "token": {"type": "str", "no_log": False},
        "affects": {"type": "list", "elements": "str", "default": []},
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "mode": {"type": "raw"},
        "validate": {"type": "str"},
    }
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "required": True, "options": entry},
            "owner": {"type": "str"},
            "group": {"type": "str"},
        },
        supports_check_mode=True,
        no_log=True,  # the journal of the host is no place for what is in the files
    )
    entries = [Entry(module, wanted) for wanted in module.params["files"]]
    for item in entries:
        item.check()
    changed = [item for item in entries if item.make()]
    # A run that was cut off may have written a file and restarted nothing.
    began = begun(*sorted({name for item in entries for name in item.affects}))
    stale = [(item, name) for item in entries for name in item.affects if is_newer(item.path, began.get(name))]
    affected = list(dict.fromkeys([name for item in changed for name in item.affects] + [name for _, name in stale]))
    shown = {"diff": [item.diff for item in changed]} if module._diff else {}
    paths = [str(item.path) for item in changed]
    module.exit_json(changed=bool(changed), paths=paths, affected=affected, invocation=asked(module), **shown)


if __name__ == "__main__":
    main()
