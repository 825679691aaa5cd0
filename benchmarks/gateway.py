"""Print the tables of docs/understand/performance.md about the gateway: `make bench-gateway`, some five minutes.

With `--part attacks` the table of docs/understand/verification-cases.md: a client beside attacks, five minutes more.

A real HAProxy with the files of the role's templates and defaults, in front of servers that only wait. Only ratios
carry over to other machines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import multiprocessing
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.figures import BenchmarkError, spread
from client.benchmarks.machine import LIMIT, BusyError, Watch, refuse_if_busy
from tests.gateway.conftest import known, make_certificate
from tests.gateway.support import HAPROXY, PAGE, PATIENCE, SERVER_KEY, Gateway, free_ports, wait_until
from tests.gateway.templates import render

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENT_KEY = "the-key-of-who-measures"
MEGABYTE = 1_000_000
TICKS = os.sysconf("SC_CLK_TCK")  # per second
DIRECT, HTTP, TLS = "direct", "HTTP", "TLS"
PERFORMANCE = ("overhead", "scaling")
PARTS = (*PERFORMANCE, "attacks")
PAUSE = 5.0  # seconds until who was refused tries again: more would measure how fast this machine connects


@dataclass(frozen=True)
class Load:
    """How much is sent.

    Attributes:
        rounds: how often everything is measured, in turn.
        pages: of a round, one at a time and again `at_once`, by the size of their bodies in bytes.
        at_once: pages in flight when it is pages per second that are measured.
        slow_pages: the same for a server that takes `latency` for each.
        latency: of that server and of the fleets, in seconds.
        fleets: the capacities of each fleet's servers; the first is what the others are compared with.
        body: bytes of a page for the fleets.
        waves: pages that are counted for a fleet, in multiples of what it reads at the same time.
        beside: pages of a round, one at a time, while the gateway is attacked.
        beside_body: their bytes.
        beside_latency: seconds that their server takes for each.
    """

    rounds: int
    pages: Mapping[int, int]
    at_once: int
    slow_pages: Mapping[int, int]
    latency: float
    fleets: Sequence[Sequence[int]]
    body: int
    waves: int
    beside: int
    beside_body: int
    beside_latency: float


FULL = Load(
    rounds=5,
    pages={MEGABYTE // 10: 1000, MEGABYTE: 300, 5 * MEGABYTE: 100},
    at_once=8,
    slow_pages={MEGABYTE: 2},
    latency=1.0,
    fleets=((8,), (8, 8), (8, 8, 8), (2, 4, 8)),
    body=MEGABYTE,
    waves=3,
    beside=50,
    beside_body=MEGABYTE // 10,
    beside_latency=0.05,
)


@dataclass(frozen=True)
class Attack:
    """Connections that are begun and kept, and opened again where the gateway ends them.

    Attributes:
        name: in the table.
        count: connections.
        tls: whether it is the gateway with TLS.
        beginning: what each sends at once.
        every_second: what each sends then.
        source: their address.
    """

    name: str
    count: int
    tls: bool = False
    beginning: bytes = b""
    every_second: bytes = b""
    source: str = "127.0.0.2"


UPLOAD = f"POST {PAGE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT_KEY}\r\n".encode()
# With the key of the good client, and at its address, where that is all that the gateway can tell them apart by.
ATTACKS = (
    Attack("20 uploads of a byte a second", 20, False, UPLOAD + b"Content-Length: 1000000\r\n\r\n", b"x", "127.0.0.1"),
    Attack(
        "20 uploads that stop after 100 kB",
        20, False, UPLOAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 100_000, source="127.0.0.1",
    ),
    Attack("2,100 half-sent requests", 2100, False, UPLOAD + b"X-Half", source="127.0.0.1"),
    Attack("3,000 half-sent requests of another address", 3000, False, UPLOAD + b"X-Half"),
    Attack("550 idle TLS connections", 550, True, source="127.0.0.1"),
)  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """What a good client saw in a round.

    Attributes:
        quiet: seconds of each page while nothing else happened.
        attacked: the same, during the attack.
        held: connections that the attack had when these pages began.
    """

    quiet: Sequence[float]
    attacked: Sequence[float]
    held: int


@dataclass(frozen=True)
class Round:
    """What a round of pages of one size showed.

    Attributes:
        latency: median seconds of a page, one at a time.
        rate: pages per second, several at once.
        cpu: CPU seconds of HAProxy a page, over both; 0 without it.
    """

    latency: float
    rate: float
    cpu: float


# What was measured of one size of pages: by the way that they took, the rounds.
Ways = Mapping[str, Sequence[Round]]


@dataclass(frozen=True)
class Flow:
    """What went through a fleet while it was busy.

    Attributes:
        rate: pages per second.
        shares: part of the pages that each server read, in the order of the fleet.
    """

    rate: float
    shares: tuple[float, ...]


def cpu_ticks(stat: str) -> int:
    """Return the clock ticks that a process ran, in user mode and in the kernel, from its /proc/PID/stat."""
    # The program's name comes second, and may hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process and of its children that live: of HAProxy's master and its worker."""
    proc = Path("/proc")
    children = (proc / f"{process}/task/{process}/children").read_text().split()
    return sum(cpu_ticks((proc / str(each) / "stat").read_text()) for each in (process, *children)) / TICKS


def pages_per_second(ends: Sequence[float], skipped: int, counted: int) -> float:
    """Return the rate at which pages were done.

    Args:
        ends: when each page was done, in seconds, ascending.
        skipped: pages at the begin that are not counted, at least one.
        counted: pages from there on; those after them do not count either.
    """
    return counted / (ends[skipped + counted - 1] - ends[skipped - 1])


@contextlib.contextmanager
def servers(capacities: Sequence[int], seconds: float) -> Iterator[list[int]]:
    """Run a server for each capacity, and yield their ports.

    Args:
        capacities: pages that each reads at the same time.
        seconds: that each page takes.
    """
    processes = []
    try:
        for capacity in capacities:
            command = [sys.executable, "-m", "benchmarks.server", str(capacity), str(seconds)]
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))
        yield [int(process.stdout.readline()) for process in processes if process.stdout]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def statistics_of(gateway: Gateway) -> dict[str, dict[str, str]]:
    """Return what HAProxy counts of each server, by its name."""
    rows = csv.DictReader(gateway.command("show stat").removeprefix("# ").splitlines())
    return {row["svname"]: row for row in rows if row["pxname"] == "ocr" and row["svname"] != "BACKEND"}


@contextlib.contextmanager
def haproxy(folder: Path, fleet: Sequence[tuple[int, int]], tls: bool = False) -> Iterator[Gateway]:
    """Run HAProxy with the role's files in front of servers, and yield it when they all are in use.

    Args:
        folder: an empty one for the files.
        fleet: port and capacity of each server; the first one's name is `server1`.
        tls: whether clients have to use TLS.

    Raises:
        BenchmarkError: HAProxy is missing, does not start, or has taken a server out meanwhile.
    """
    if not shutil.which(HAPROXY):
        raise BenchmarkError("HAProxy is missing. Fix: apt-get install haproxy")
    hosts = {
        f"server{number}": [known(f"server{number}", port, capacity=capacity, limit=0)]
        for number, (port, capacity) in enumerate(fleet, 1)
    }
    port, metrics_port = free_ports(2)
    variables: dict[str, Any] = {
        "inventory_hostname": "gateway",
        "dots_ocr_gateway_address": "127.0.0.1",
        "dots_ocr_gateway_port": port,
        "dots_ocr_gateway_metrics_port": metrics_port,
        "_dots_ocr_gateway_config": str(folder),
        "_dots_ocr_gateway_run": str(folder),
        "_dots_ocr_gateway_log": str(folder / "log.sock"),
        "_dots_ocr_gateway_clients": [{"name": "benchmark", "key": CLIENT_KEY}],
        "_dots_ocr_gateway_server_keys": [SERVER_KEY],
        "_dots_ocr_gateway_fleet": hosts,
    }
    trust = None
    if tls:
        certificate, key = make_certificate(folder)
        (folder / "tls.pem").write_text(certificate.read_text() + key.read_text())
        variables |= {"dots_ocr_gateway_tls_certificate": str(certificate), "dots_ocr_gateway_tls_key": str(key)}
        trust = ssl.create_default_context(cafile=str(certificate))
    for file in ("haproxy.cfg", "clients.map", "server-key.map", "page.html"):
        (folder / file).write_text(render(f"{file}.j2", variables))
    gateway = Gateway(folder, port, metrics_port, trust)
    try:
        try:
            gateway.start()
            wait_until(
                lambda: all(row["check_status"] == "L7OK" for row in statistics_of(gateway).values()), "servers in use"
            )
        except AssertionError as error:
            output = (folder / "output").read_text().strip()
            raise BenchmarkError(f"the gateway is not ready: {error} {output}. Fix: run tests/gateway") from None
        yield gateway
        # One that comes back would get less than its share for as long as dots_ocr_gateway_slowstart says. At the start
        # of HAProxy, where every server is in use at once, that does not apply.
        lost = [name for name, row in statistics_of(gateway).items() if row["chkdown"] != "0"]
        if lost:
            raise BenchmarkError(
                f"servers did not answer the gateway for a while: {', '.join(lost)}. Fix: end what keeps the CPU busy"
            )
    finally:
        gateway.process.terminate()  # the master ends its worker
        gateway.process.wait(PATIENCE)


class Sender:
    """Sends pages to one address."""

    def __init__(self, port: int, gateway: Gateway | None = None) -> None:
        """Take the port of a server, or that of the gateway with its certificate."""
        self._gateway = gateway
        trust = gateway.tls if gateway else None
        self.client = httpx2.AsyncClient(
            base_url=f"{'https' if trust else 'http'}://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {CLIENT_KEY if gateway else SERVER_KEY}"},
            verify=trust or False,
            limits=httpx2.Limits(),
            timeout=PATIENCE,
            trust_env=False,
        )

    async def send(self, body: bytes) -> str:
        """Send a page, and return the name of the server that read it; none if it was sent there directly.

        Raises:
            BenchmarkError: it was not read.
        """
        try:
            answer = await self.client.post(PAGE, content=body)
        except httpx2.HTTPError as error:
            raise BenchmarkError(f"a page was not read: {error!r}. Fix: end what keeps the CPU busy") from error
        if answer.status_code != 200:
            raise BenchmarkError(
                f"a page was refused with {answer.status_code}: {answer.text[:200]}. Fix: run tests/gateway"
            )
        return str(answer.headers.get("X-Dots-Ocr-Server", ""))

    async def flood(self, body: bytes, pages: int, at_once: int) -> list[tuple[float, str]]:
        """Keep pages in flight until all are sent.

        Returns:
            When each was done, in seconds of the monotonic clock, and by which server; in this order.
        """
        done = []
        left = iter(range(pages))

        async def work() -> None:
            for _ in left:
                name = await self.send(body)
                done.append((time.monotonic(), name))

        await asyncio.gather(*(work() for _ in range(min(at_once, pages))))
        return done

    async def one_by_one(self, body: bytes, pages: int) -> list[float]:
        """Send pages one at a time, and return the seconds of each."""
        seconds = []
        for _ in range(pages):
            start = time.perf_counter()
            await self.send(body)
            seconds.append(time.perf_counter() - start)
        return seconds

    def cpu(self) -> float:
        """Return the CPU seconds that the gateway has used; 0 without one."""
        return cpu_seconds(self._gateway.process.pid) if self._gateway else 0.0

    async def round(self, body: bytes, pages: int, at_once: int) -> Round:
        """Measure pages one at a time, then several at once, over connections that are open already."""
        await self.flood(body, at_once, at_once)
        before = self.cpu()
        latency = statistics.median(await self.one_by_one(body, pages))
        start = time.monotonic()
        ends = await self.flood(body, pages, at_once)
        rate = pages / (ends[-1][0] - start)
        return Round(latency, rate, (self.cpu() - before) / (2 * pages))


async def compare(
    targets: Mapping[str, tuple[int, Gateway | None]], pages: Mapping[int, int], at_once: int, rounds: int
) -> dict[int, Ways]:
    """Send the same pages by several ways, in turn.

    Args:
        targets: port and gateway of each way.
        pages: of a round, by the size of their bodies in bytes.
        at_once: pages in flight in the second half of a round.
        rounds: how many.

    Raises:
        BenchmarkError: a page was not read.
    """
    found: dict[int, dict[str, list[Round]]] = {size: {way: [] for way in targets} for size in pages}
    async with contextlib.AsyncExitStack() as stack:
        senders = {way: Sender(*target) for way, target in targets.items()}
        for sender in senders.values():
            await stack.enter_async_context(sender.client)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for size, count in pages.items():
                for way, sender in senders.items():
                    found[size][way].append(await sender.round(b"x" * size, count, at_once))
    return dict(found)


def overhead(folder: Path, pages: Mapping[int, int], at_once: int, seconds: float, rounds: int) -> dict[int, Ways]:
    """Compare gateways with the server behind them: with plain HTTP, and with TLS between client and gateway.

    Args:
        folder: for the gateways' files.
        pages: of a round, by the size of their bodies in bytes.
        at_once: pages in flight in the second half of a round.
        seconds: that the server takes for a page.
        rounds: how many.

    Raises:
        BenchmarkError: a page was not read, or HAProxy does not run.
    """
    with contextlib.ExitStack() as stack:
        (port,) = stack.enter_context(servers([at_once], seconds))
        targets: dict[str, tuple[int, Gateway | None]] = {DIRECT: (port, None)}
        for way in (HTTP, TLS):
            files = Path(tempfile.mkdtemp(dir=folder))
            gateway = stack.enter_context(haproxy(files, [(port, at_once)], tls=way == TLS))
            targets[way] = (gateway.port, gateway)
        return asyncio.run(compare(targets, pages, at_once, rounds))


async def flow(gateway: Gateway, fleet: Sequence[int], load: Load, at_once: int) -> Flow:
    """Keep pages in flight at a fleet, and look at the middle of it.

    Args:
        gateway: in front of the fleet.
        fleet: its servers' capacities.
        load: which pages.
        at_once: pages in flight.

    Raises:
        BenchmarkError: a page was not read.
    """
    wave = min(at_once, sum(fleet))
    counted = load.waves * wave
    sender = Sender(gateway.port, gateway)
    async with sender.client:
        # Neither the first wave, which fills the servers, nor the last pages, which empty them.
        done = await sender.flood(b"x" * load.body, wave + counted + at_once, at_once)
    readers = Counter(name for _, name in done[wave : wave + counted])
    shares = tuple(readers[f"server{number}"] / counted for number in range(1, len(fleet) + 1))
    return Flow(pages_per_second([end for end, _ in done], wave, counted), shares)


def scaling(folder: Path, load: Load) -> tuple[list[list[Flow]], list[Flow]]:
    """Measure fleets in turn.

    Returns:
        The rounds of each fleet with twice as many pages in flight as it reads at the same time, and those of the last
        fleet with half as many.

    Raises:
        BenchmarkError: a page was not read, or HAProxy does not run.
    """
    full: list[list[Flow]] = [[] for _ in load.fleets]
    half = []
    with contextlib.ExitStack() as stack:
        gateways = []
        for fleet in load.fleets:
            ports = stack.enter_context(servers(fleet, load.latency))
            files = Path(tempfile.mkdtemp(dir=folder))
            gateways.append(stack.enter_context(haproxy(files, list(zip(ports, fleet, strict=True)))))
        for number in range(load.rounds):
            print(f"round {number + 1} of {load.rounds}", file=sys.stderr, flush=True)
            for flows, gateway, fleet in zip(full, gateways, load.fleets, strict=True):
                flows.append(asyncio.run(flow(gateway, fleet, load, 2 * sum(fleet))))
            half.append(asyncio.run(flow(gateways[-1], load.fleets[-1], load, max(1, sum(load.fleets[-1]) // 2))))
    return full, half


async def keep_connection(attack: Attack, gateway: Gateway) -> None:
    """Keep one connection of an attack, for ever."""
    while True:
        writer = None
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", gateway.port, ssl=gateway.tls, local_addr=(attack.source, 0)
            )
            writer.write(attack.beginning)
            while not reader.at_eof():
                with contextlib.suppress(TimeoutError):
                    # Whatever the gateway says, it has ended the request.
                    await asyncio.wait_for(reader.read(1), 1)
                    break
                writer.write(attack.every_second)
                await writer.drain()
        if writer:
            writer.close()
        await asyncio.sleep(PAUSE)


@contextlib.contextmanager
def under(attack: Attack, gateway: Gateway) -> Iterator[None]:
    """Attack a gateway, from a process of its own: the good client has enough to do with itself."""

    async def keep_all() -> None:
        await asyncio.gather(*(keep_connection(attack, gateway) for _ in range(attack.count)))

    attacker = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(keep_all()), daemon=True)
    attacker.start()
    try:
        yield
    finally:
        attacker.kill()
        attacker.join()


def beside(attack: Attack, gateway: Gateway, load: Load) -> Beside:
    """Send pages as a good client before an attack and during it.

    Raises:
        BenchmarkError: a page was not read.
    """

    async def pages() -> list[float]:
        seconds = []
        for _ in range(load.beside):
            # Over a connection of its own: one that is open already would not notice much.
            sender = Sender(gateway.port, gateway)
            async with sender.client:
                seconds += await sender.one_by_one(b"x" * load.beside_body, 1)
        return seconds

    quiet = asyncio.run(pages())
    with under(attack, gateway):
        # Until all have tried, so that it is the attack that is measured and not its beginning.
        time.sleep(PAUSE)
        held = gateway.connections()
        attacked = asyncio.run(pages())
    # The next attack finds the gateway as this one did.
    wait_until(lambda: gateway.connections() == 0, "the end of the attack")
    return Beside(quiet, attacked, held)


def attacks(folder: Path, load: Load) -> dict[str, list[Beside]]:
    """Attack gateways, and look at the pages of a good client beside it.

    Raises:
        BenchmarkError: a page was not read, or HAProxy does not run.
    """
    found: dict[str, list[Beside]] = {attack.name: [] for attack in ATTACKS}
    with contextlib.ExitStack() as stack:
        (port,) = stack.enter_context(servers([load.at_once], load.beside_latency))
        gateways = [
            stack.enter_context(haproxy(Path(tempfile.mkdtemp(dir=folder)), [(port, load.at_once)], tls=tls))
            for tls in (False, True)
        ]
        for number in range(load.rounds):
            print(f"round {number + 1} of {load.rounds}", file=sys.stderr, flush=True)
            for attack in ATTACKS:
                found[attack.name].append(beside(attack, gateways[attack.tls], load))
    return found


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def pairs(ways: Ways) -> Iterator[tuple[str, list[tuple[Round, Round]]]]:
    """Return each way through the gateway with its rounds, each beside the direct one of the same turn."""
    for way, rounds in ways.items():
        if way != DIRECT:
            yield way, list(zip(rounds, ways[DIRECT], strict=True))


def latency_rows(found: Mapping[int, Ways], seconds: float) -> list[str]:
    """Return the rows about pages one at a time, to a server that takes some seconds for each."""
    return [
        row(
            f"{seconds:g} s" if seconds else "no time",
            f"{size / MEGABYTE:g}",
            way,
            spread([1000 * direct.latency for _, direct in rounds], 1),
            spread([1000 * gateway.latency for gateway, _ in rounds], 1),
            spread([1000 * (gateway.latency - direct.latency) for gateway, direct in rounds], 1),
            spread([gateway.latency / direct.latency for gateway, direct in rounds]),
        )
        for size, ways in found.items()
        for way, rounds in pairs(ways)
    ]


def rate_rows(found: Mapping[int, Ways]) -> list[str]:
    """Return the rows about pages several at once, and HAProxy's CPU time."""
    return [
        row(
            f"{size / MEGABYTE:g}",
            way,
            spread([direct.rate for _, direct in rounds], 0),
            spread([gateway.rate for gateway, _ in rounds], 0),
            spread([gateway.rate / direct.rate for gateway, direct in rounds]),
            spread([1000 * gateway.cpu for gateway, _ in rounds]),
        )
        for size, ways in found.items()
        for way, rounds in pairs(ways)
    ]


def overhead_tables(found: Mapping[int, Ways], slow: Mapping[int, Ways], load: Load) -> str:
    """Return the tables of the gateway against the server itself: medians, with the least and the greatest."""
    lines = [
        "| the server takes | body, MB | to the gateway by | direct, ms | gateway, ms | more, ms | gateway ÷ direct |",
        "|---|--:|---|--:|--:|--:|--:|",
        *latency_rows(found, 0),
        *latency_rows(slow, load.latency),
        "",
        f"| body, MB | to the gateway by | direct, pages/s ({load.at_once} at once) | gateway, pages/s "
        "| gateway ÷ direct | HAProxy's CPU, ms a page |",
        "|--:|---|--:|--:|--:|--:|",
        *rate_rows(found),
    ]
    return "\n".join(lines)


def scaling_tables(full: Sequence[Sequence[Flow]], half: Sequence[Flow], load: Load) -> str:
    """Return the tables of the fleets: medians, with the least and the greatest."""
    lines = [
        "| capacities of the servers | pages/s possible | pages/s | efficiency | pages/s ÷ those of one server |",
        "|---|--:|--:|--:|--:|",
    ]
    for fleet, flows in zip(load.fleets, full, strict=True):
        possible = sum(fleet) / load.latency
        ratios = [each.rate / first.rate for each, first in zip(flows, full[0], strict=True)]
        rates = [each.rate for each in flows]
        lines.append(
            row(
                ", ".join(map(str, fleet)),
                f"{possible:g}",
                spread(rates),
                spread([rate / possible for rate in rates], 3),
                spread(ratios),
            )
        )
    last = load.fleets[-1]
    lines += [
        "",
        "| capacity | its share by weight, % | of the pages, all servers full, % | half as many pages in flight, % |",
        "|--:|--:|--:|--:|",
    ]
    for number, capacity in enumerate(last):
        shares = [[100 * each.shares[number] for each in flows] for flows in (full[-1], half)]
        lines.append(row(str(capacity), f"{100 * capacity / sum(last):.1f}", *(spread(each, 1) for each in shares)))
    return "\n".join(lines)


def attack_table(found: Mapping[str, Sequence[Beside]]) -> str:
    """Return the table of a good client beside attacks: medians of the rounds, with the least and the greatest."""
    lines = [
        "| attack | connections that it held | a page without it, ms | with it, ms | with ÷ without "
        "| the longest, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, rounds in found.items():
        quiet, attacked = (
            [statistics.median(getattr(each, when)) for each in rounds] for when in ("quiet", "attacked")
        )
        lines.append(
            row(
                name,
                spread([each.held for each in rounds], 0),
                spread([1000 * each for each in quiet], 1),
                spread([1000 * each for each in attacked], 1),
                spread([after / before for before, after in zip(quiet, attacked, strict=True)]),
                spread([1000 * max(each.attacked) for each in rounds], 0),
            )
        )
    return "\n".join(lines)


def measure(part: str, load: Load) -> str:
    """Measure a part, one of PARTS, and return its tables.

    Raises:
        BenchmarkError: a page was not read, or HAProxy does not run; there is no figure then.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if part == "scaling":
            return scaling_tables(*scaling(folder, load), load)
        if part == "attacks":
            return attack_table(attacks(folder, load))
        quick = overhead(folder, load.pages, load.at_once, 0, load.rounds)
        slow = overhead(folder, load.slow_pages, load.at_once, load.latency, load.rounds)
        return overhead_tables(quick, slow, load)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all but attacks")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help=f"of everything; default: {FULL.rounds}")
    parser.add_argument("--others", type=float, default=LIMIT, help=f"share of CPU they may take; default: {LIMIT}")
    options = parser.parse_args(words)
    try:
        refuse_if_busy(options.others)
        watch = Watch()
        tables = [measure(part, replace(FULL, rounds=options.rounds)) for part in options.part or PERFORMANCE]
        tables.append(watch.record(options.others))
    except (BenchmarkError, BusyError) as error:
        print(f"nothing was measured: {error}.", file=sys.stderr)
        return 1
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
