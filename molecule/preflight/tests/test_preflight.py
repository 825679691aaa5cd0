"""The preflight changes nothing."""

from testinfra.host import Host


def test_preflight_left_nothing(host: Host) -> None:
    for path in ("/etc/docker", "/etc/dots-ocr", "/var/lib/dots-ocr", "/usr/sbin/dockerd"):
        assert not host.file(path).exists
