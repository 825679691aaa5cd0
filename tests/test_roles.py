"""The contracts of the roles: the specification of arguments is the truth, defaults and README follow it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar

from tests.templating import data_loader

REPOSITORY = Path(__file__).resolve().parent.parent
ROLES = sorted(path for path in (REPOSITORY / "roles").iterdir() if path.is_dir())

every_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


@functools.cache
def load(file: Path) -> Any:
    """Return the contents of a YAML file."""
    return yaml.safe_load(file.read_text())


def options(role: Path) -> dict[str, Any]:
    """Return the options of the role's entry points that need no value."""
    specified = load(role / "meta/argument_specs.yml")["argument_specs"].values()
    every = ((name, option) for entry in specified for name, option in entry["options"].items())
    return {name: option for name, option in every if not option.get("required")}


@every_role
def test_every_default_is_specified_and_the_other_way_round(role: Path) -> None:
    assert set(load(role / "defaults/main.yml")) == set(options(role))


@every_role
def test_defaults_equal_the_specification(role: Path) -> None:
    specified = {name: option["default"] for name, option in options(role).items() if "default" in option}
    actual = load(role / "defaults/main.yml")
    assert {name: actual[name] for name in specified} == specified


@every_role
def test_option_without_a_default_is_computed(role: Path) -> None:
    actual = load(role / "defaults/main.yml")
    for name in (name for name, option in options(role).items() if "default" not in option):
        assert "{{" in actual[name]


@every_role
def test_every_default_has_a_comment(role: Path) -> None:
    blocks = (role / "defaults/main.yml").read_text().removeprefix("---\n").split("\n\n")
    assert all(block.startswith("#") for block in blocks)


@every_role
def test_readme_is_generated_from_the_specification(role: Path, tmp_path: Path) -> None:
    copy = tmp_path / "roles" / role.name
    shutil.copytree(role, copy)
    command = ["aar-doc", "--output-template", str(REPOSITORY / "docs/role.md.j2"), str(copy), "markdown"]
    subprocess.run(command, check=True, capture_output=True)
    assert (copy / "README.md").read_text() == (role / "README.md").read_text(), "run 'make docs'"


@every_role
def test_role_has_a_scenario_of_its_own_or_tests_beside_it(role: Path) -> None:
    elsewhere = {
        "chatvlmllm": "molecule/cpu/application.yml",
        "dots_ocr_cpu": "molecule/cpu/molecule.yml",
        "dots_ocr_gateway": "tests/gateway/test_behaviour.py",
        "monitoring": "tests/monitoring/test_rules.py",
    }
    assert (REPOSITORY / elsewhere.get(role.name, f"molecule/{role.name}/molecule.yml")).is_file()


@every_role
def test_role_that_installs_can_remove(role: Path) -> None:
    if f"{role.name}_state" in options(role):
        assert (role / "tasks/absent.yml").exists()
        assert (role / "tasks/present.yml").exists()
    else:
        assert role.name == "preflight"


def tasks_of(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield tasks, those in blocks too; what is watched is among their modules."""
    for task in tasks:
        watched = task.get("dots_ocr.deploy.watched", {})
        yield {**task, watched["module"]: watched} if "module" in watched else task
        for key in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks"):
            yield from tasks_of(task.get(key, []))


# With what a name of a task or play begins: verbs that people who use Ansible expect.
VERBS = re.compile(
    r"(Apply|Build|Calculate|Check|Collect|Compare|Configure|Copy|Create|Deploy|Download|Drain|Ensure|Fail|Gather|Include|"
    r"Install|Load|Mask|Measure|Pack|Pin|Plan|Prepare|Pull|Read|Reboot|Rebuild|Record|Refresh|Reload|Remove|Restart|Restore|Roll|"
    r"Run|Save|Select|Show|Skip|Start|Stop|Undrain|Uninstall|Unpack|Update|Upgrade|Validate|Verify|Wait|Warn|Write)\b"
)


def test_tasks_begin_with_a_usual_verb() -> None:
    folders = ("roles/*/tasks", "roles/*/handlers", "playbooks", "playbooks/tasks")
    files = [file for folder in folders for file in REPOSITORY.glob(f"{folder}/*.yml")]
    names = [(file, str(task["name"])) for file in files for task in tasks_of(load(file) or []) if "name" in task]
    assert len(names) > 500
    assert [f"{file.relative_to(REPOSITORY)}: {name}" for file, name in names if not VERBS.match(name)] == []


def test_one_variable_sets_how_long_every_task_waits_for_the_locks_of_apt() -> None:
    modules = (
        "ansible.builtin.apt",
        *(f"dots_ocr.deploy.{name}" for name in ("apt_set", "nvidia_driver_plan")),
    )
    files = [*REPOSITORY.glob("roles/*/tasks/*.yml"), *REPOSITORY.glob("playbooks/*.yml")]
    waits = {
        f"{file.relative_to(REPOSITORY)}: {task.get('name')}": task[module].get("lock_timeout")
        for file in files
        for task in tasks_of(load(file) or [])
        for module in modules
        if module in task
    }
    assert len(waits) > 20
    assert {name: wait for name, wait in waits.items() if wait != "{{ apt_lock_timeout | default(600) }}"} == {}


# Of Ubuntu 26.04's coreutils, `install -o` knows accounts only, and the containers' users are numbers without one.
UNITS = sorted(REPOSITORY.glob("roles/*/templates/**/*.service.j2"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_unit_needs_no_install_of_gnu(unit: Path) -> None:
    programs = re.findall(r"(?m)^Exec\w+=(.*)$", unit.read_text())
    assert programs
    assert [line for line in programs if re.search(r"\binstall\b.* (?:-\w*[og]\b|--owner|--group)", line)] == []


# Each with what a unit may set instead, for a reason that stands beside it in the unit.
LIMITS = {
    "CapabilityBoundingSet": "(CAP_DAC_READ_SEARCH|CAP_NET_BIND_SERVICE)?",
    "LockPersonality": "yes",
    "NoNewPrivileges": "yes",
    "PrivateTmp": "yes",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHome": "yes|tmpfs|read-only",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectSystem": "strict",
    "RestrictAddressFamilies": "AF_UNIX( AF_INET AF_INET6)?",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service(\n=~.*)*",
    "UMask": "00[027]{2}",
}


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_unit_has_limits(unit: Path) -> None:
    text = unit.read_text()
    # All of them: systemd takes the last of several, or adds them up.
    found = {name: "\n".join(re.findall(rf"(?m)^[ \t]*{name}[ \t]*(=.*)$", text)) for name in LIMITS}
    wrong = {name: found[name] for name, value in LIMITS.items() if not re.fullmatch(f"=(?:{value})", found[name])}
    assert wrong == {}


@pytest.mark.parametrize("playbook", sorted(REPOSITORY.glob("playbooks/*.yml")), ids=lambda path: path.name)
def test_whatever_fetches_something_gets_the_proxy(playbook: Path) -> None:
    ours = ("apt_set", "client_wheels")
    fetching = {*(f"dots_ocr.deploy.{name}" for name in ours), "ansible.builtin.apt", "ansible.builtin.uri"}
    roles = {
        role.name
        for role in ROLES
        for file in role.glob("tasks/*.yml")
        for task in tasks_of(load(file) or [])
        if fetching & set(task)
    }
    for play in load(playbook):
        tasks = list(tasks_of([play]))
        included = [task["ansible.builtin.include_role"] for task in tasks if "ansible.builtin.include_role" in task]
        used = {role["name"] for role in included if role.get("tasks_from", "main") == "main"}
        used |= {role["role"] for role in play.get("roles", [])}
        fetches = used & roles or any(fetching & set(task) for task in tasks)
        if fetches and playbook.name != "uninstall.yml":
            assert play.get("vars_files") == "vars/network.yml", play["name"]
            assert play.get("environment") == "{{ network_environment }}", play["name"]


def test_proxy_reaches_tasks_and_engine_by_one_set_of_variables() -> None:
    full = {"http_proxy": "http://p:3128", "https_proxy": "http://p:3129", "no_proxy": ["mirror", ".lan"]}
    cases: dict[str, dict[str, Any]] = {
        "none": {},
        "one": {"https_proxy": "http://p:3128"},
        "other": {"http_proxy": "http://p:3128"},
        "both": full,
        "only-no": {"no_proxy": "mirror"},
    }
    loader = data_loader()
    known = {
        name: value
        for file in ("playbooks/vars/network.yml", "roles/docker_engine/defaults/main.yml")
        for name, value in loader.load_from_file(str(REPOSITORY / file), trusted_as_template=True).items()
    }
    templars = {name: Templar(loader=loader, variables=known | case) for name, case in cases.items()}
    found = {
        name: [templar.template(known[variable]) for variable in ("network_environment", "docker_engine_proxy")]
        for name, templar in templars.items()
    }
    assert found == {
        "none": [{}, {}],
        "only-no": [{}, {}],
        "one": [
            {"https_proxy": "http://p:3128", "no_proxy": "localhost,127.0.0.1,::1"},
            {"http": "", "https": "http://p:3128", "no_proxy": ""},
        ],
        "other": [
            {"http_proxy": "http://p:3128", "no_proxy": "localhost,127.0.0.1,::1"},
            {"http": "http://p:3128", "https": "", "no_proxy": ""},
        ],
        "both": [
            {**full, "no_proxy": "mirror,.lan,localhost,127.0.0.1,::1"},
            {"http": "http://p:3128", "https": "http://p:3129", "no_proxy": "mirror,.lan"},
        ],
    }


def test_password_of_the_proxy_is_not_shown() -> None:
    tasks = load(REPOSITORY / "playbooks/host.yml")[0]["pre_tasks"]
    assert [task.get("no_log") for task in tasks if "network_environment" in str(task)] == [True]


JINJA = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
CONDITIONS = ("when", "that", "until", "changed_when", "failed_when")
# Of what a message names, nothing is read.
TEXT = re.compile(r"'[^'\n]*\s[^'\n]*'")


def expressions(part: Any, key: str = "") -> Iterator[str]:
    """Yield what Ansible evaluates in a part of a file of tasks or variables."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield from expressions(value, name)
    elif isinstance(part, list):
        for value in part:
            yield from expressions(value, key)
    elif isinstance(part, str):
        yield from [part] if key in CONDITIONS else JINJA.findall(part)


def evaluated(folder: Path) -> str:
    """Return what Ansible evaluates in a role, in a playbook, or in the playbooks of a folder, one after the other."""
    files = [folder] if folder.is_file() else [file for file in sorted(folder.rglob("*")) if file.is_file()]
    found: list[str] = []
    for file in files:
        if file.suffix == ".yml" and file.parent.name != "meta":
            found += expressions(load(file))
        elif file.suffix == ".j2":
            found += JINJA.findall(file.read_text())
    return TEXT.sub("", "\n".join(found))


@every_role
def test_role_reads_no_other_roles_variables_and_files(role: Path) -> None:
    """What the inventory says of another host, as hostvars has it, is nobody's default."""
    text = evaluated(role)
    others = [other for other in ROLES if other != role]
    names = {name for other in others for name in options(other)}
    read = {name for name in re.findall(r"(?<![.\w])\w+", text) if name in names}
    private = [name for other in others for name in re.findall(rf"\b_{other.name}_\w+", text)]
    every = [file.read_text(errors="ignore") for file in role.rglob("*") if file.suffix in (".yml", ".j2")]
    files = [line for other in others for line in re.findall(rf".*\.\./{other.name}/.*", "\n".join(every))]
    assert (read, private, files) == (set(), [], [])


@pytest.mark.parametrize("playbook", sorted(REPOSITORY.glob("playbooks/**/*.yml")), ids=lambda path: path.name)
def test_playbook_uses_no_private_name_of_a_role(playbook: Path) -> None:
    text = playbook.read_text()
    assert [name for role in ROLES for name in re.findall(rf"\b_{role.name}_\w+", text)] == []


def test_port_stands_in_one_place() -> None:
    files = [*REPOSITORY.glob("roles/*/[!m]*/**/*.yml"), *REPOSITORY.glob("roles/*/templates/**/*.j2")]
    found = [
        line
        for file in [*files, *REPOSITORY.glob("playbooks/**/*.yml")]
        for line in re.findall(r"(?mi)^.*port.*\b8000\b.*$", file.read_text())
        if "chatvlmllm" not in file.parts  # an application of others, which has a port of its own
    ]
    # And where vLLM listens in its container, which is nobody else's business.
    assert sorted(found) == ["_dots_ocr_server_inner_port: 8000", "dots_ocr_server_port: 8000"]


PHASES = {"install", "configure", "run"}
# Only the first phase fetches, only the second writes what the service reads.
FETCHING = {"ansible.builtin.apt", "dots_ocr.deploy.apt_set"}


def included(file: Path, name: str) -> Iterator[Path]:
    """Yield the files beside this one that a name can stand for, which may be a template; not those that remove."""
    if name == "{{ dots_ocr_server_bring }}":  # what a role for another engine sets
        yield from REPOSITORY.glob("roles/*/tasks/bring*.yml")
    found = re.search("{{.*}}", name)
    template = found[0] if found else ""
    words = ["present"] if re.fullmatch(r"{{ \w+_state }}", template) else re.findall(r"'(\w+)'", template) or ["*"]
    for word in words if name.endswith(".yml") else ():
        paths = file.parent.glob(name.replace(template, word) if template else name)
        yield from (path for path in paths if path != file and not path.stem.endswith("_absent"))


def tagged(file: Path, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, dict[str, Any], frozenset[str]]]:
    """Yield the tasks of a file, and of those that it includes for `present`: name, task, tags as Ansible sees them."""
    where = f"{file.parent.parent.name}/{file.name}"

    def of(tasks: list[dict[str, Any]], above: frozenset[str]) -> Iterator[tuple[str, dict[str, Any], frozenset[str]]]:
        for task in tasks:
            own = task.get("tags", [])
            tags = above | ({own} if isinstance(own, str) else set(own))
            for key in ("block", "rescue", "always"):
                yield from of(task.get(key, []), tags)
            if not {"block", "ansible.builtin.import_tasks"} & task.keys():
                yield f"{where}: {task.get('name')}", task, tags
            # The tags of the blocks around an include are handed on, its own are not; an import hands on both.
            for key, given in (("ansible.builtin.include_tasks", above), ("ansible.builtin.import_tasks", tags)):
                wanted = task.get(key, "")
                for other in included(file, str(wanted["file"] if isinstance(wanted, dict) else wanted)):
                    yield from tagged(other, given)
            if role := task.get("ansible.builtin.include_role"):
                folder = REPOSITORY / "roles" / role["name"].rpartition(".")[2] / "tasks"
                yield from tagged(folder / f"{role.get('tasks_from', 'main')}.yml", above)

    yield from of(load(file), above)


@every_role
def test_every_task_belongs_to_a_phase(role: Path) -> None:
    found = [(where, task.keys(), tags) for where, task, tags in tagged(role / "tasks/main.yml")]
    assert {where: set(tags) for where, _, tags in found if not tags or not tags <= PHASES} == {}
    assert [where for where, keys, tags in found if FETCHING & keys and tags != {"install"}] == []


def test_no_task_waits_long_without_saying_how_far_it_is() -> None:
    """A retried task shows how often it will be retried, and nothing else; a *_wait.yml shows what it waits for."""
    files = [*REPOSITORY.glob("roles/*/tasks/*.yml"), *REPOSITORY.glob("playbooks/*.yml")]
    retried = [(file.name, task) for file in files for task in tasks_of(load(file) or []) if "until" in task]
    assert len(retried) > 5
    tries = {(name, task["name"]): re.findall(r"\d+", str(task["retries"])) for name, task in retried}
    long = [name for name, numbers in tries.items() if not numbers or max(map(int, numbers)) > 30]
    # For the lock on apt's lists, which is hardly ever held.
    assert [file for file, _ in long] == ["airgap_unpack.yml"], long
    every = [task for file in files for task in tasks_of(load(file) or [])]
    slow = [task for task in every if {"ansible.builtin.apt", "ansible.builtin.pip"} & {*task}]
    assert slow
    assert all("dots_ocr.deploy.watched" in task for task in slow)


PULLED = "a1: Pulling fs layer\na2: Already exists\na3: Pulling fs layer\na1: Pull complete\na1: Pull complete"
LOST = "a1: Pulling fs layer\ndocker pull: connection refused"


@pytest.mark.parametrize(
    ("state", "said", "expected"),
    [
        ("active", PULLED, (124, "2 3 1500", "")),
        ("active", "", (124, "0 0 1500", "")),
        ("failed", LOST, (1, "", "connection refused")),
        ("inactive", "", (0, "", "")),
    ],
)
def test_wait_for_a_pull_tells_how_far_it_is(
    tmp_path: Path, state: str, said: str, expected: tuple[int, str, str]
) -> None:
    programs = {
        "systemctl": f'case "$*" in *ActiveState*) echo {state} ;; show*) echo 0 ;; esac',
        "df": "echo Avail; echo 2500",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pull.log").write_text(said)
    wait = load(REPOSITORY / "roles/dots_ocr_server/tasks/pull_wait.yml")[0]["ansible.builtin.shell"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "UNIT": "pull", "FIRST": "1", "FREE": "4000", "PLACE": "/"}
    environment["LOG"] = str(tmp_path / "pull.log")
    command = [wait["executable"], "-c", wait["cmd"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == expected


def test_wait_for_a_start_tells_how_far_it_is_and_grows(tmp_path: Path) -> None:
    verdict = {"ready": False, "problem": "It does not answer.", "fix": "wait", "journal": "shards: 50%", "left": 1740}
    ready = tmp_path / "ready"
    ready.write_text(
        f'#!/bin/sh\necho "$2" >>{tmp_path}/calls\n[ "$2" = --wait=20 ] || {{ echo {{}}; exit 0; }}\n'
        f"echo '{json.dumps(verdict)}'; exit 75\n"
    )
    ready.chmod(0o755)
    values = {
        "_dots_ocr_server_programs": str(tmp_path),
        "_dots_ocr_server_state": {"now": 1000},
        "_dots_ocr_server_recorded": {"dots-ocr": {}},
        "dots_ocr_server_ready_timeout": 1800,
        # Not the system's, whose packages `make rehearse` may be replacing at the same time.
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "_name": "dots-ocr",
        "_index": 0,
    }
    file = REPOSITORY / "roles/dots_ocr_server/tasks/ready_one.yml"
    tasks = [{"ansible.builtin.include_tasks": str(file)}]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": values, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = ["ansible-playbook", "--inventory=localhost,", str(tmp_path / "play.yml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "dots-ocr has 1740 of 1800 s left. It does not answer. Its journal: shards: 50%" in said
    assert (tmp_path / "calls").read_text().split() == ["--wait=20", "--wait=35"]
