"""Run the tests of the client's Qwen engine: `python -m tests.qwen REPORT`.

They need torch and transformers, which are inside vLLM's image of the rehearsal; only the client's small requirements
and pytest are added. The container has no network, so that nothing can be downloaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rehearsal import images
from rehearsal.engine import LABEL, STATE
from rehearsal.shell import REPOSITORY, fingerprint, pins, run

PACKAGES = ("iniconfig", "nh3", "pluggy", "pypdfium2", "pytest")  # what the image lacks
LOCK = REPOSITORY / "requirements.lock"


def packages() -> Path:
    """Return a folder with `PACKAGES` for the image's Python; download them unless it is there."""
    folder = STATE / "qwen-tests" / fingerprint(LOCK, Path(__file__))
    if not folder.exists():
        growing = folder.with_suffix(".growing")
        locked = growing.with_suffix(".lock")
        locked.parent.mkdir(exist_ok=True)
        locked.write_text("\n".join(pins(LOCK)[name] for name in PACKAGES))
        run(sys.executable, "-m", "pip", "install", "-qq", "--upgrade", *images.pip_platform_options(),
            "--target", growing, "--require-hashes", "--requirement", locked)  # fmt: skip
        growing.rename(folder)
    return folder


def main() -> int:
    """Return pytest's exit status."""
    report = Path(sys.argv[1]).resolve()
    mounts = {REPOSITORY / "client": "/client:ro", packages(): "/packages:ro", report.parent: "/reports"}
    volumes = [word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}")]
    environment = {
        "HF_HOME": "/tmp/huggingface",
        "OMP_NUM_THREADS": "1",  # more would wait for each other busily where other parts run beside
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "/client/src:/client/tests_qwen:/packages",
    }
    settings = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    subprocess.run(["docker", "rm", "--force", "test-qwen"], check=True)
    container = ("docker", "run", "--rm", "--name", "test-qwen", "--network", "none", "--read-only", "--label", LABEL,
                 "--tmpfs", "/tmp:exec")  # fmt: skip
    pytest = ("-m", "pytest", "--rootdir=/client", "-p", "no:cacheprovider", f"--junitxml=/reports/{report.name}")
    return subprocess.run(
        [*container, *volumes, *settings, "--workdir", "/client", "--entrypoint", "python3", images.vllm(), *pytest,
         "tests_qwen"],
        check=False, stdin=subprocess.DEVNULL,
    ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
