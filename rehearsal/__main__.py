"""The command line of the rehearsal: `python -m rehearsal --help`."""

from __future__ import annotations

import argparse
import os
import sys

from rehearsal import engine, hosts, rehearse
from rehearsal.shell import RehearsalError, say


def main() -> None:
    """Carry out one command; an expected failure ends in one clear line and status 1."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description="Rehearse the deployment without a GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("run", help="deploy on a rehearsal host, verify, read a page; leave it running")
    whole.add_argument("options", nargs="*", help="after --, for ansible-playbook: -- --user=me")
    commands.add_parser("down", help="remove every trace")
    commands.add_parser("prepare", help="install what the tests need and make sure that an engine runs")
    commands.add_parser("train", help="train the tiny model again, after a change of its sources")
    mirror = commands.add_parser("mirror", help="make sure that the engine and the mirror run")
    mirror.add_argument("--server", choices=hosts.SERVERS, help="with this in its registry, too")
    for name, text in (("up", "start a host without deploying"), ("destroy", "remove a host and its data")):
        host = commands.add_parser(name, help=text)
        host.add_argument("name")
        if name == "up":
            way = host.add_mutually_exclusive_group()
            way.add_argument("--port", type=int, help="of this machine's loopback, to reach the OCR port at")
            way.add_argument("--no-network", action="store_true", help="nothing but loopback: an air gap")
            way.add_argument("--keep-address", action="store_true", help="come back to the same address after a kill")
    arguments = parser.parse_args()

    try:
        if os.geteuid() != 0:
            raise RehearsalError("needs root, to run a Docker Engine and to build images: use make, which asks sudo")
        if arguments.command not in ("down", "run"):
            engine.install_packages(tests=arguments.command == "prepare")
            engine.ensure()
        match arguments.command:
            case "run":
                rehearse.run(arguments.options)
            case "down":
                engine.stop()
            case "mirror":
                hosts.mirror_up(arguments.server)
            case "train":
                hosts.train()
            case "up":
                network, keep_address = not arguments.no_network, arguments.keep_address
                hosts.up(arguments.name, port=arguments.port, network=network, keep_address=keep_address)
            case "destroy":
                hosts.destroy(arguments.name)
    except RehearsalError as error:
        say(f"rehearsal: {error}")
        sys.exit(1)


main()
