"""What pages come to while hosts are added, upgraded and lost; in this order, each test leaves the fleet whole."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dots_ocr_client import DotsOCR, Page, VLLMEngine

from tests.fleet.conftest import RATE, Events
from tests.fleet.hosts import (
    CPU,
    GATEWAY,
    GPUS,
    KEY,
    MONITOR,
    SCENARIO,
    address,
    all_up,
    docker,
    drained,
    image,
    on,
    play,
    recap,
    states,
    wait_until,
)
from tests.fleet.load import GOLDEN, Event
from tests.monitoring import live

WRONG_MODEL = Path(__file__).parent / "wrong_model.py"
SECONDS_AFTER = 10  # to go on for when the gateway has noticed
# What the stand-in for nvidia-smi does not know, and what there is with certificates only.
MISSING = ["DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE"]
MISSING += ["dots_ocr_certificate_expiry_time_seconds", "dots_ocr_certificate_readable"]


def assert_only_pages_in_flight_are_lost(event: Event, end: float) -> None:
    """Lost is at most what had been sent when the host was gone, with an error after which clients come back."""
    assert all(page.retried for page in event.lost), event.lost
    assert all(page.start < end for page in event.lost), [(page.start - end, page.fault) for page in event.lost]


def alerts() -> set[tuple[str, str]]:
    """Return which alerts are pending or firing, and for which host."""
    found = live.ask(f"http://{address(MONITOR)}:9090", "alerts")["alerts"]
    return {(alert["labels"]["alertname"], alert["labels"].get("host", "")) for alert in found} & {
        ("DotsOcrServerDown", host) for host in GPUS
    }


@contextlib.contextmanager
def reading() -> Iterator[list[str]]:
    """Read the golden page with our client again and again; any page that it gives up ends the test."""
    texts: list[str] = []
    faults: list[Exception] = []
    end = threading.Event()

    def read() -> None:
        engine = VLLMEngine(f"http://{address(GATEWAY)}:8080/v1", api_key=KEY)
        try:
            with DotsOCR(engines=[engine]) as ocr:
                while not end.is_set():
                    page = ocr.read_page(GOLDEN / "page.png", mode="text")
                    assert isinstance(page, Page), page
                    texts.append(page.text)
                    time.sleep(1)
        except Exception as error:  # shown below, where pytest sees it
            faults.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield texts
    finally:
        end.set()
        thread.join()
    assert not faults, faults


def test_reload_of_the_gateway(during: Events) -> None:
    with during("gateway reloaded three times", planned=True) as happened:
        for _ in range(3):
            on(GATEWAY, "systemctl", "reload", "dots-ocr-gateway")
            time.sleep(2)
    assert happened.event.lost == []


def test_further_host_is_one_line_and_one_command(during: Events) -> None:
    assert list(states()) == ["test-fleet-1", CPU]
    with during("a further host", planned=True) as happened:
        status, output = play("site.yml")
        wait_until(lambda: all_up(*GPUS), "the further host in use")
    assert status == 0, output[-3000:]
    assert happened.event.lost == []
    # A second run over the others; gateway and monitor learn of the new one.
    changed = {host for host, (count, _) in recap(output).items() if count}
    assert changed == {"test-fleet-2", GATEWAY, MONITOR}
    assert (SCENARIO / "further.ini").read_text().splitlines()[1:] == ["[ocr_servers]", "test-fleet-2"]


def test_upgrade_of_all(during: Events) -> None:
    before, already = [image(host) for host in GPUS], len(drained())
    with during("all upgraded", planned=True) as happened:
        status, output = play("playbooks/upgrade.yml", json.dumps({"fleet_tags": dict.fromkeys(GPUS, "v0.32.0-next")}))
        wait_until(lambda: all_up(), "all in use")
    assert status == 0, output[-3000:]
    assert happened.event.lost == []
    assert {page.engine for page in happened.event.pages} == {"vllm"}
    assert not set(before) & {image(host) for host in GPUS}
    # The stand-in ends too quickly to lose a page that the gateway would still send.
    assert sorted(drained()[already:]) == GPUS
    assert recap(output)[GATEWAY] == (0, 0), "nothing new for the gateway, so it is left alone"


def test_upgrade_that_fails_is_taken_back_on_all_if_asked(during: Events) -> None:
    before = [image(host) for host in GPUS]
    tags = {GPUS[0]: "v0.32.0", GPUS[1]: "v0.32.0-no-kernel"}
    with during("upgrade broken on the second GPU host", planned=True) as happened:
        settings = {"fleet_tags": tags, "upgrade_all_or_none": True, "upgrade_batches": [1, "100%"]}
        # The CPU host has neither a part in it nor another image.
        status, output = play("playbooks/upgrade.yml", json.dumps(settings), limit=",".join(GPUS))
        wait_until(lambda: all_up(), "all in use")
    assert status == 2, output[-3000:]
    assert "no kernel image is available" in output
    assert happened.event.lost == []
    assert [image(host) for host in GPUS] == before


def test_host_is_killed(during: Events) -> None:
    """Clients get everything all the same: ours comes back after what the load counts as lost."""
    host, place = GPUS[0], address(GPUS[0])
    with during("host killed", planned=False) as happened, reading() as texts:
        docker("kill", host)
        killed = time.monotonic()
        wait_until(lambda: states()[host] == "DOWN", "the gateway notices")
        wait_until(lambda: alerts() == {("DotsOcrServerDown", host)}, "the alert")
        docker("start", host)
        wait_until(all_up, "the host in use again")
    assert address(host) == place, "it came back with another address, as no real host does"
    assert_only_pages_in_flight_are_lost(happened.event, killed)
    assert len(texts) > 5
    assert [text.split() for text in texts] == [(GOLDEN / "page.txt").read_text().split()] * len(texts)


def test_host_freezes(during: Events) -> None:
    host = GPUS[1]
    with during("host frozen", planned=False) as happened:
        # The host's container does not hold that of vLLM: each is frozen by its own engine.
        on(host, "docker", "pause", "dots-ocr")
        docker("pause", host)
        try:
            wait_until(lambda: states()[host] == "DOWN", "the gateway notices")
            noticed = time.monotonic()
            time.sleep(SECONDS_AFTER)
        finally:
            docker("unpause", host)
            on(host, "docker", "unpause", "dots-ocr")
        wait_until(all_up, "the host in use again")
    # A host that is frozen still takes pages until the gateway knows; most are read when it continues.
    assert_only_pages_in_flight_are_lost(happened.event, noticed)


def test_wrong_model_gets_no_page(during: Events) -> None:
    host = GPUS[0]
    with during("wrong model on a host", planned=False) as happened:
        on(host, "systemctl", "stop", "dots-ocr.service")
        wait_until(lambda: states()[host] == "DOWN", "the gateway notices")
        stopped = time.monotonic()
        docker("cp", str(WRONG_MODEL), f"{host}:/root/wrong_model.py")
        docker("exec", "--detach", host, "python3", "/root/wrong_model.py", "8000", "/root/wrong_model.log")
        log = ("sh", "-c", "cat /root/wrong_model.log || true")
        wait_until(lambda: "GET /v1/models" in on(host, *log), "the gateway asks it")
        time.sleep(SECONDS_AFTER)
        asked, state = on(host, *log), states()[host]
        on(host, "pkill", "--full", "/root/wrong_model.py")
        on(host, "rm", "/root/wrong_model.py", "/root/wrong_model.log")
        on(host, "systemctl", "start", "dots-ocr.service")
        wait_until(all_up, "the host in use again")
    assert state == "DOWN"
    assert "POST" not in asked
    # vLLM answers some pages with 500 while it stops; none is lost to the wrong model.
    assert_only_pages_in_flight_are_lost(happened.event, stopped)


def test_backup_reads_when_all_gpus_are_gone(during: Events) -> None:
    with during("all GPU hosts killed", planned=False) as happened:
        docker("kill", *GPUS)
        killed = time.monotonic()
        wait_until(lambda: all(states()[host] == "DOWN" for host in GPUS), "the gateway notices")
        time.sleep(SECONDS_AFTER)
        docker("start", *GPUS)
        wait_until(all_up, "all in use again")
    event = happened.event
    assert_only_pages_in_flight_are_lost(event, killed)
    by_cpu = [page for page in event.pages if page.engine == "cpu"]
    assert {page.server for page in by_cpu} == {CPU}
    assert len(by_cpu) >= SECONDS_AFTER * RATE / 2


def test_monitor_sees_all_of_it() -> None:
    url = f"http://{address(MONITOR)}:9090"
    targets = live.ask(url, "targets", state="active")["activeTargets"]
    jobs = Counter(target["labels"]["job"] for target in targets)
    assert jobs == {"dots_ocr": 3, "node": 5, "haproxy": 1, "prometheus": 1}
    assert [target["scrapeUrl"] for target in targets if target["health"] != "up"] == []
    assert live.problems(url, without=MISSING) == []


def test_second_run_of_monitoring_changes_nothing() -> None:
    status, output = play("playbooks/monitoring.yml")
    assert status == 0, output[-3000:]
    assert set(recap(output).values()) == {(0, 0)}
