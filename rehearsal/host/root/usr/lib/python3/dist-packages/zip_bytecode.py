"""Keep the bytecode of modules that come in archives, until the next boot.

Ansible sends each module as an archive of sources, which Python would compile again each time.
"""

import marshal
import os
import zipimport
from _imp import source_hash
from pathlib import Path

CACHE = Path("/run/zip-bytecode")
compile_source = zipimport._compile_source


def compile_source_once(pathname, source):
    """Compile a module's source, or return what came of it before."""
    file = CACHE / source_hash(0, source).hex()
    try:
        return marshal.loads(file.read_bytes())
    except (OSError, EOFError, ValueError, TypeError):
        code = compile_source(pathname, source)
    try:
        CACHE.mkdir(exist_ok=True)
        growing = file.with_suffix(f".{os.getpid()}")
        growing.write_bytes(marshal.dumps(code))
        growing.rename(file)
    except OSError:
        pass  # somebody who may not write there
    return code


zipimport._compile_source = compile_source_once
