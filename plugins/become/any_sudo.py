"""Ansible's become plugin sudo, which knows sudo-rs too: Ubuntu's sudo from 25.10 on.

Ansible's own waits for a prompt of its making at the start of a line. sudo-rs puts that prompt into one of its own
(`[sudo: PROMPT] Password:`), so that Ansible waits in vain. ansible.cfg makes this one the method of all hosts.
"""

from __future__ import annotations

# The options of Ansible's own plugin, which it reads from the file that the plugin is in.
DOCUMENTATION = """
name: any_sudo
short_description: become another user with sudo, classic or in Rust
description: As Ansible's own plugin sudo, and with the prompt and the messages of sudo-rs.
author: The dots-ocr-deploy founders !UNKNOWN
options:
  become_user:
    description: who the commands run as
    default: root
    ini: [{section: privilege_escalation, key: become_user}, {section: sudo_become_plugin, key: user}]
    vars: [{name: ansible_become_user}, {name: ansible_sudo_user}]
    env: [{name: ANSIBLE_BECOME_USER}, {name: ANSIBLE_SUDO_USER}]
    keyword: [{name: become_user}]
  become_exe:
    description: the program; by default the classic sudo where Ubuntu keeps it beside sudo-rs, else sudo
    default: $(command -v sudo.ws || echo sudo)
    ini: [{section: privilege_escalation, key: become_exe}, {section: sudo_become_plugin, key: executable}]
    vars: [{name: ansible_become_exe}, {name: ansible_sudo_exe}]
    env: [{name: ANSIBLE_BECOME_EXE}, {name: ANSIBLE_SUDO_EXE}]
    keyword: [{name: become_exe}]
  become_flags:
    description: its flags
    default: -H -S -n
    ini: [{section: privilege_escalation, key: become_flags}, {section: sudo_become_plugin, key: flags}]
    vars: [{name: ansible_become_flags}, {name: ansible_sudo_flags}]
    env: [{name: ANSIBLE_BECOME_FLAGS}, {name: ANSIBLE_SUDO_FLAGS}]
    keyword: [{name: become_flags}]
  become_pass:
    description: the password that it asks for
    required: false
    ini: [{section: sudo_become_plugin, key: password}]
    vars: [{name: ansible_become_password}, {name: ansible_become_pass}, {name: ansible_sudo_pass}]
    env: [{name: ANSIBLE_BECOME_PASS}, {name: ANSIBLE_SUDO_PASS}]
  sudo_chdir:
    description: folder to enter before
    type: string
    required: false
    ini: [{section: sudo_become_plugin, key: chdir}]
    vars: [{name: ansible_sudo_chdir}]
    env: [{name: ANSIBLE_SUDO_CHDIR}]
"""

from ansible.module_utils.common.text.converters import to_bytes
from ansible.plugins.become.sudo import BecomeModule as Sudo


class BecomeModule(Sudo):  # type: ignore[misc]
    """Either sudo."""

    fail = (*Sudo.fail, "Authentication failed, try again", "incorrect authentication attempt")
    missing = (*Sudo.missing, "interactive authentication is required")

    def check_password_prompt(self, b_output: bytes) -> bool:
        """Tell whether the prompt is there, alone or within that of sudo-rs."""
        return bool(self.prompt) and to_bytes(self.prompt) in b_output
