"""The images of the rehearsal, from the Debian archive and PyPI, each cached under the fingerprint of its sources.

There is no registry to build upon: every image starts as a Debian system that mmdebstrap unpacks and Docker imports.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from rehearsal.engine import LABEL, STATE, one_at_a_time
from rehearsal.shell import RehearsalError, fingerprint, output, pins, run, say, step, succeeds

HERE = Path(__file__).resolve().parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_PYTHON = "3.11"  # Debian 12's; the CPU build of torch is at hand for it on every machine that has one
# What downloads from the Hub in any image of vLLM: of its wheels all that the stand-in has; PyYAML it has from Debian.
HUB_CLIENT = ["huggingface_hub", "filelock", "tqdm", "typing_extensions", "httpx2"]
HUB_CLIENT += ["anyio", "h11", "httpcore2", "idna", "sniffio", "truststore"]  # what httpx2 needs
NEWEST_GLIBC_MINOR = 36  # Debian 12 has glibc 2.36


@one_at_a_time("host-image")
def host() -> str:
    """Build the image that plays every kind of host (Debian 13, systemd, no Docker yet); return its name."""
    name = _name("host", HERE / "host", Path(__file__))
    if not _exists(name):
        with step("build the host image"):
            _debian(name, "trixie", HERE / "host")
    return name


@one_at_a_time("mirror-image")
def mirror() -> str:
    """Build the image of the mirror: OCI registry, apt repositories with their key, Hub; return its name."""
    name = _name("mirror", HERE / "mirror", Path(__file__))
    if not _exists(name):
        with step("build the mirror image"):
            _debian(name, "trixie", HERE / "mirror", 'chroot "$1" /usr/local/lib/mirror/make-apt-key')
    return name


@one_at_a_time("vllm-image")
def vllm() -> str:
    """Build the image of vLLM's CPU build, which takes the command line of the GPU image; return its name."""
    name = _name("vllm", HERE / "vllm", Path(__file__))
    if not _exists(name):
        with step("download vLLM's CPU build and what it needs"):
            wheels = _vllm_wheels()
        with step("build the vLLM image"):
            install = f'"{HERE}/vllm/install" "$1" "{wheels}" "{sys.executable}"'
            # Without the second variable vLLM fills its share of the memory, many GiB, with KV cache before it answers.
            changes = ['ENTRYPOINT ["vllm", "serve"]', "ENV HOME=/home/vllm VLLM_CPU_KVCACHE_SPACE=1"]
            _debian(name, "bookworm", HERE / "vllm", install, changes)
    return name


@one_at_a_time("stand-in-image")
def vllm_stand_in() -> str:
    """Build the small image that speaks vLLM's protocol where vLLM is not what is tested; return its name."""
    folder, repository, lock = HERE / "vllm_stand_in", HERE.parent, HERE / "vllm/requirements.lock"
    golden = (repository / "roles/dots_ocr_server/files/golden", repository / "tests/monitoring/metrics.json")
    name = _name("vllm-stand-in", folder, *golden, lock, Path(__file__))
    if not _exists(name):
        with step("build the image of vLLM's stand-in"):
            client = STATE / "hub-client.lock"
            client.write_text("\n".join(pin for package, pin in pins(lock).items() if package in HUB_CLIENT))
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", "--require-hashes"]
            pip += [*pip_platform_options(), "--requirement", str(client), "--target"]
            copy = " && ".join(f'cp -r "{source}" "$1/golden"' for source in golden)
            packages = '"$1/usr/lib/python3/dist-packages"'
            hook = f'{copy} && chmod -R a+rX "$1/golden" && {shlex.join(pip)} {packages} && rm -r {packages}/bin'
            _debian(name, "trixie", folder, hook, ['ENTRYPOINT ["vllm", "serve"]', "ENV HOME=/home/vllm"])
    return name


def pip_platform_options() -> list[str]:
    """Return pip's options for Debian 12's Python, whatever Python the controller itself runs."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC_MINOR + 1)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    abis = ["cp" + VLLM_PYTHON.replace(".", ""), "abi3", "none"]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", VLLM_PYTHON, "--implementation", "cp"]
    for option, values in (("--abi", abis), ("--platform", platforms)):
        for value in values:
            options += [option, value]
    return options


def _name(kind: str, *sources: Path) -> str:
    return f"{LABEL}/{kind}:{fingerprint(*sources)}"


def _exists(name: str) -> bool:
    return succeeds("docker", "image", "inspect", name)


def _debian(name: str, suite: str, folder: Path, hook: str | None = None, changes: list[str] | None = None) -> None:
    """Import a Debian system as an image: the packages of folder/packages.txt, with folder/root laid over them."""
    packages = [line for line in (folder / "packages.txt").read_text().split() if line]
    with tempfile.TemporaryDirectory(dir=STATE) as scratch:
        overlay = Path(scratch) / "overlay.tar"
        with tarfile.open(overlay, "w") as archive:
            archive.add(folder / "root", arcname=".", filter=_owned_by_root)
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}"]
        command += [f"--dpkgopt=path-exclude=/usr/share/{place}/*" for place in ("doc", "man", "locale")]
        command += [f"--customize-hook=tar-in {overlay} /"]
        command += [f"--customize-hook={hook}"] if hook else []
        command += [suite, "-", *_debian_mirror()]
        options = [word for change in changes or [] for word in ("--change", change)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as build:
            imported = subprocess.run(["docker", "import", *options, "-", name], stdin=build.stdout, check=False)
        if build.returncode != 0 or imported.returncode != 0:
            if imported.returncode == 0:
                output("docker", "image", "rm", name)
            raise RehearsalError(f"could not build {name}: the reason stands above")


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _debian_mirror() -> list[str]:
    """Return the Debian mirror that this machine itself is configured with, or nothing for mmdebstrap's default."""
    listing = output("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)")
    for line in listing.splitlines():
        origin, label, uri = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return [uri]
    return []


def _vllm_wheels() -> Path:
    """Download the locked wheels with the controller's own pip configuration."""
    wheels = STATE / "wheels"
    wheels.mkdir(exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "-qq", "--dest", str(wheels), *pip_platform_options(),
                "--require-hashes", "--requirement"]  # fmt: skip
    lock, torch = HERE / "vllm/requirements.lock", STATE / "torch.lock"
    torch.write_text(pins(lock)["torch"])
    if not succeeds(*download, torch):
        say("    this machine's own package sources lack the locked torch: taking it from PyTorch's CPU index")
        run(*download, torch, "--index-url", TORCH_CPU_INDEX)
    run(*download, lock, "--find-links", wheels)
    return wheels
