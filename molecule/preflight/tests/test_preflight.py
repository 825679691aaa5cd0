"""The preflight changes nothing."""

import pytest
from testinfra.host import Host


@pytest.mark.parametrize("path", ["/etc/docker", "/etc/dots-ocr", "/var/lib/dots-ocr", "/usr/sbin/dockerd"])
def test_preflight_left_nothing(host: Host, path: str) -> None:
    assert not host.file(path).exists
