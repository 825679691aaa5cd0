#!/usr/bin/python3
"""Stand-in for cmd.exe, schtasks.exe, wsl.exe, wslpath and wslinfo, whichever name it is called by.

Notes every call as a line of JSON in /var/lib/stand-in/calls, and answers as they do where it matters: line ends,
UTF-16, exit statuses, a task that only an administrator may create. /var/lib/stand-in/windows.json says what there is:

drive          where C: is mounted
user, domain   of Windows
distribution   the name of this one
version        of WSL; --update makes it 2.6.1.0
tasks          name and XML of the scheduled tasks
denied         whether the user may create none
"""

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FOLDER = Path("/var/lib/stand-in")
STATE = FOLDER / "windows.json"
NAMESPACE = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
state = json.loads(STATE.read_text())
tasks = state.setdefault("tasks", {})
with (FOLDER / "calls").open("a") as calls:
    calls.write(json.dumps([name, *arguments]) + "\n")


def say(text: str, encoding: str = "utf-8") -> None:
    """Print lines as Windows does."""
    sys.stdout.buffer.write(text.replace("\n", "\r\n").encode(encoding))


def linux(path: str) -> Path:
    """Return the place of a path of Windows."""
    return Path(state["drive"]) / path.removeprefix("C:\\").replace("\\", "/")


def save() -> None:
    """Write the state back."""
    STATE.write_text(json.dumps(state))


def refuse(message: str) -> None:
    """End as a program of Windows that fails."""
    say(f"{message}\n")
    sys.exit(1)


def set_variables() -> None:
    """Answer 'cmd.exe /u /d /c set USER'. Without /u a name with an umlaut comes in another code page."""
    if arguments[-2:] != ["set", "USER"]:
        refuse("stand-in: not understood")
    profile = f"C:\\Users\\{state['user']}"
    answer = f"USERDOMAIN={state['domain']}\nUSERNAME={state['user']}\nUSERPROFILE={profile}\n"
    say(answer, "utf-16-le" if "/u" in arguments else "cp850")


def schedule() -> None:
    """Answer schtasks.exe."""
    task = arguments[arguments.index("/tn") + 1]
    if arguments[0] == "/create":
        data = linux(arguments[arguments.index("/xml") + 1]).read_bytes()
        if not data.startswith(b"\xff\xfe"):
            refuse("ERROR: The task XML is malformed.")
        text = data.decode("utf-16")
        # The declaration of a string must not name an encoding.
        tree = ElementTree.fromstring(text.split("?>", 1)[1])
        user = tree.find(f"{NAMESPACE}Triggers/{NAMESPACE}LogonTrigger/{NAMESPACE}UserId")
        # A task at anybody's logon is for administrators.
        if state.get("denied") or user is None or user.text != f"{state['domain']}\\{state['user']}":
            refuse("ERROR: Access is denied.")
        tasks[task] = text
        say(f'SUCCESS: The scheduled task "{task}" has successfully been created.\n')
    elif task not in tasks:
        refuse("ERROR: The system cannot find the file specified.")
    elif arguments[0] == "/delete":
        del tasks[task]
        say(f'SUCCESS: The scheduled task "{task}" was successfully deleted.\n')
    elif "/xml" in arguments:
        say(tasks[task].replace("\r\n", "\n"))
    save()


def translate() -> None:
    """Answer wslpath."""
    direction, path = arguments
    drive = state["drive"]
    if direction == "-u":
        print(linux(path) if path != "C:\\" else f"{drive}/")
    elif path.startswith(drive):
        print("C:\\" + path.removeprefix(drive).strip("/").replace("/", "\\"))
    else:
        print(f"\\\\wsl.localhost\\{state['distribution']}" + path.replace("/", "\\"))


def update() -> None:
    """Answer 'wsl.exe --update', in UTF-16 unless it is told otherwise by what Windows is let know."""
    asked = "WSL_UTF8" in os.environ.get("WSLENV", "").split(":") and os.environ.get("WSL_UTF8") == "1"
    if arguments != ["--update"]:
        refuse("stand-in: not understood")
    state["version"] = "2.6.1.0"
    save()
    say("Updating Windows Subsystem for Linux to version: 2.6.1.\n", "utf-8" if asked else "utf-16-le")


def inform() -> None:
    """Answer wslinfo."""
    print({"--wsl-version": state["version"], "--networking-mode": "nat"}[arguments[0]])


{"cmd.exe": set_variables, "schtasks.exe": schedule, "wsl.exe": update, "wslpath": translate, "wslinfo": inform}[name]()
