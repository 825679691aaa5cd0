"""Runs inside vLLM's image and tells what that version makes of a command line: one question a line, one answer a line.

A question is a JSON object with the lists `arguments`, `environment` and `metrics`: the words after `vllm serve`, names
of variables, names of metrics. The answer has the `version`; the `status`, `message` and `values` of parsing; and what
is `shortened` (an option that is not written out), `unknown_environment` and `unknown_metrics`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def answer(question: dict[str, list[str]]) -> dict[str, Any]:
    """Ask vLLM's own code."""
    vllm = import_module("vllm")
    parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser(prog="vllm")
    (serve,) = import_module("vllm.entrypoints.cli.serve").cmd_init()
    options = serve.subparser_init(parser.add_subparsers(dest="subparser"))._option_string_actions
    known = import_module("vllm.envs").environment_variables

    result: dict[str, Any] = {"version": vllm.__version__, "status": 0, "message": "", "values": {}}
    with contextlib.redirect_stderr(io.StringIO()) as message:
        try:
            arguments = parser.parse_args(["serve", *question["arguments"]])
            serve.validate(arguments)
            result["values"] = vars(arguments)
        except SystemExit as stop:
            result.update(status=stop.code, message=message.getvalue())
        except (TypeError, ValueError) as error:
            result.update(status=1, message=str(error))
    written = {word.split("=")[0].replace("_", "-") for word in question["arguments"] if word.startswith("--")}
    result["shortened"] = sorted(written - set(options))
    result["unknown_environment"] = sorted(set(question["environment"]) - set(known))
    result["unknown_metrics"] = unknown_metrics(question["metrics"], Path(vllm.__path__[0]))
    return result


def unknown_metrics(names: list[str], source: Path) -> list[str]:
    """Return the names that stand nowhere in vLLM's source; the Prometheus library appends the endings of some."""
    text = "".join(file.read_text() for file in source.rglob("*.py")) if names else ""
    plain = {name: re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}
    return sorted(name for name in names if not re.search(rf"['\"]({name}|{plain[name]})['\"]", text))


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM logs to standard output
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line)), default=repr), file=answers, flush=True)
