"""Say in JSON what an installation needs to know of the interpreter that runs this."""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
from pathlib import Path

client = None
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    client = importlib.metadata.version("dots-ocr-client")
# Written by the role when it installs; without it the client, if there is one, is somebody else's.
record = Path(sys.prefix, "dots-ocr-client.installed")
print(
    json.dumps(
        {
            "version": platform.python_version(),
            "machine": platform.machine(),
            "glibc": platform.libc_ver()[1],
            "pip": importlib.util.find_spec("pip") is not None,
            # PEP 668: the distribution's own Python takes no packages from pip.
            "managed": sys.prefix == sys.base_prefix
            and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists(),
            "client": client,
            "record": str(record),
            "fingerprint": record.read_text().strip() if record.exists() else "",
        }
    )
)
