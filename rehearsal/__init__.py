"""The rehearsal: what stands in for the GPU host that a developer's machine is not, built from Debian and PyPI."""
