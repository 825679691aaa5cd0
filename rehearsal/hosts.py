"""Hosts of the rehearsal: containers with systemd as their first process, each able to run a Docker Engine inside."""

from __future__ import annotations

import hashlib
import platform
import shlex
import shutil
import time
from pathlib import Path

from rehearsal import images
from rehearsal.engine import LABEL, NETWORK, RUN, STATE, address, one_at_a_time
from rehearsal.shell import RehearsalError, fingerprint, output, pins, run, say, step, succeeds

HERE = Path(__file__).resolve().parent
TINY_MODEL = HERE / "tiny_model"
MODEL = TINY_MODEL / "dots.ocr"  # as trained: `python -m rehearsal train`
MODEL_SOURCES = TINY_MODEL / "dots.ocr.sources"
APT = HERE / "apt"  # one folder per repository
APT_KEY_FINGERPRINT = RUN / "apt-key-fingerprint"  # for inventories, as a user copies it from a vendor's page
CUDA_KEY_FINGERPRINTS = RUN / "cuda-key-fingerprints.json"  # likewise, by the distribution's folder
BOOT_SECONDS = 60
FORWARDED_PORT = 18000  # host/root/etc/systemd/system/loopback-forward.socket
MIRROR = "dots-ocr-rehearsal-mirror"
PUSH = "/usr/local/lib/mirror/push-images"
IMAGE_TAG = "v0.32.0"
# What the registry's tags add to IMAGE_TAG: nothing, an upgrade that works, and two that do not.
VARIANTS = {
    "": "LABEL variant=plain",
    "-next": "LABEL variant=next",
    "-wrong-model": "ENV REHEARSAL_FAULT=wrong-model",
    "-no-kernel": "ENV REHEARSAL_FAULT=no-kernel",
}
# What a registry offers: its repository, and the image with its variants.
SERVERS = {
    "vllm": ("vllm/vllm-openai", images.vllm, ("", "-next")),
    "stand-in": ("stand-in/vllm/vllm-openai", images.vllm_stand_in, tuple(VARIANTS)),
}
MODEL_REPOSITORY = "dots-studio/dots.ocr"


def up(name: str, *, port: int | None = None, network: bool = True, keep_address: bool = False) -> None:
    """Start a host unless it runs.

    With a port, its OCR port is reachable at 127.0.0.1:port of this machine. Without a network it has a loopback
    interface and no other, and is reached through the engine alone. One that keeps its address comes back to it after
    it was killed, as a real host does.
    """
    options = ["--publish", f"127.0.0.1:{port}:{FORWARDED_PORT}"] if port else []
    options += [] if network else ["--network", "none"]
    options += ["--ip", address(name)] if keep_address else []
    _start(name, images.host(), *options, "--volume", "/var/lib/docker")


def destroy(name: str) -> None:
    """Remove a host and its data; a host that does not exist is fine."""
    if succeeds("docker", "container", "inspect", name):
        output("docker", "rm", "--force", "--volumes", name)


def mirror_up(server: str | None = None) -> None:
    """Start the mirror: vendors' packages, the tiny model, and in its registry what should serve it, one of SERVERS."""
    with one_at_a_time("mirror"):
        _start(MIRROR, images.mirror(), "--network-alias", "mirror", "--volume", "/var/lib/docker-registry")
        _copy(MODEL, f"/srv/hub/{MODEL_REPOSITORY}")
        _copy(APT, "/usr/src/apt")
        _fill_apt()
    if server:
        with one_at_a_time(server):
            _fill_registry(server)


def _copy(folder: Path, place: str) -> None:
    """Copy a folder into the mirror unless it has just this one. A mount would be another for each checkout."""
    mark, wanted = f"/srv/copied{place}", fingerprint(folder)
    if not succeeds("docker", "exec", MIRROR, "grep", "--quiet", wanted, mark):
        output("docker", "exec", MIRROR, "rm", "-rf", place, mark)
        output("docker", "exec", MIRROR, "mkdir", "-p", str(Path(place).parent), str(Path(mark).parent))
        output("docker", "cp", "--quiet", str(folder), f"{MIRROR}:{place}")
        output("docker", "exec", MIRROR, "chmod", "-R", "a+rX", place)
        output("docker", "exec", MIRROR, "sh", "-c", f"echo {wanted} >{mark}")


def _fill_registry(server: str) -> None:
    """Push the image of vLLM or its stand-in, with its variants, unless this mirror has them."""
    repository, build, variants = SERVERS[server]
    image = build()
    mirror = output("docker", "inspect", "--format", "{{.Id}}", MIRROR)
    pushed = STATE / f"pushed-{mirror[:12]}-{image.split(':')[1]}"
    if not pushed.exists():
        with step(f"push {repository} to the registry"):
            names = [f"{LABEL}/{repository}:{IMAGE_TAG}{suffix}" for suffix in variants]
            for name, suffix in zip(names, variants, strict=True):
                _derive(image, VARIANTS[suffix], name)
            # `docker push` would take minutes to pack it.
            save, push = ("docker", "save", *names), ("docker", "exec", "--interactive", MIRROR, PUSH, LABEL, *names)
            run("bash", "-o", "pipefail", "-c", f"{shlex.join(save)} | {shlex.join(push)}")
        pushed.touch()


def _fill_apt() -> None:
    """Make the apt repositories whose sources changed, and note the fingerprints of the keys that sign them."""
    for repository in sorted(path.name for path in APT.iterdir()):
        # Some packages are for the kernel that runs.
        output("docker", "exec", MIRROR, "/usr/local/lib/mirror/build-apt-repository", repository,
               f"{fingerprint(APT / repository)}-{platform.release()}")  # fmt: skip
    APT_KEY_FINGERPRINT.write_text(output("docker", "exec", MIRROR, "cat", "/srv/apt/fingerprint"))
    CUDA_KEY_FINGERPRINTS.write_text(output("docker", "exec", MIRROR, "cat", "/srv/apt/cuda/fingerprints.json"))


def train() -> None:
    """Train the tiny model again, inside vLLM's image, and put it and the fingerprint of its sources in its place."""
    image = images.vllm()
    growing = STATE / "model.growing"
    run("install", "-d", "-o", "2000", "-g", "0", growing)
    with step("train the tiny model"):
        run("docker", "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp",
            "--user", "2000:0", "--label", LABEL, "--env", "PYTHONUNBUFFERED=1",
            "--volume", f"{TINY_MODEL}:/source:ro", "--volume", f"{growing}:/model",
            "--entrypoint", "python3", image, "/source/train.py", "/model")  # fmt: skip
    shutil.copytree(growing, MODEL, dirs_exist_ok=True)
    shutil.rmtree(growing)
    MODEL_SOURCES.write_text(model_sources() + "\n")


def model_sources() -> str:
    """Return the fingerprint of what the tiny model is made from."""
    programs = [file for file in sorted(TINY_MODEL.glob("*.py")) if not file.name.startswith("test_")]
    versions = [pin.split()[0] for pin in pins(HERE / "vllm/requirements.lock").values()]
    return hashlib.sha256("\n".join([fingerprint(*programs), *versions]).encode()).hexdigest()[:12]


def _derive(image: str, change: str, name: str) -> None:
    """Make an image that differs from another in one instruction of a Dockerfile."""
    container = output("docker", "create", "--label", LABEL, "--network", "none", image)
    output("docker", "commit", "--change", change, container, name)
    output("docker", "rm", container)


def _start(name: str, image: str, *options: str) -> None:
    if "--network" not in options:
        options = ("--network", NETWORK, *options)
    definition = hashlib.sha256("\0".join([image, *options]).encode()).hexdigest()[:12]
    if succeeds("docker", "container", "inspect", name):
        template = f'{{{{.State.Running}}}} {{{{index .Config.Labels "{LABEL}"}}}}'
        if output("docker", "inspect", "--format", template, name) == f"true {definition}":
            return
        say(f"==> {name} is stopped or out of date: starting it afresh")
        destroy(name)
    with step(f"start {name}"):
        # All capabilities but one: nested containers may lack it, and --privileged insists on it.
        output("docker", "run", "--detach", "--name", name, "--hostname", name, "--label", f"{LABEL}={definition}",
               "--stop-signal", "SIGRTMIN+3", "--restart", "on-failure",
               "--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE",
               "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
               "--security-opt", "systempaths=unconfined", "--cgroupns", "host",
               "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--tmpfs", "/run", "--tmpfs", "/run/lock",
               "--env", "container=docker", *options, image, "/lib/systemd/systemd")  # fmt: skip
        # Docker's mark of a container: a host plays a machine.
        output("docker", "exec", name, "rm", "--force", "/.dockerenv")
        _wait_for_boot(name)


def _wait_for_boot(name: str) -> None:
    end = time.monotonic() + BOOT_SECONDS
    while not succeeds("docker", "exec", name, "systemctl", "is-system-running", "--quiet"):
        if time.monotonic() > end:
            failed = output("docker", "exec", name, "systemctl", "--failed", "--no-legend", "--plain")
            raise RehearsalError(f"{name} did not come up within {BOOT_SECONDS} s; failed units: {failed or 'none'}")
        time.sleep(0.5)
