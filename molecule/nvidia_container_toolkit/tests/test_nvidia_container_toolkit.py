"""The GPU is a CDI device, from a signed repository, without the legacy hook."""

from testinfra.host import Host


def test_gpu_is_a_cdi_device(host: Host) -> None:
    assert host.check_output("nvidia-ctk cdi list").splitlines() == ["nvidia.com/gpu=0", "nvidia.com/gpu=all"]


def test_specification_is_refreshed_at_boot_and_on_changes(host: Host) -> None:
    assert host.service("nvidia-cdi-refresh.service").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_running


def test_repository_is_signed_by_its_own_key(host: Host) -> None:
    source = host.file("/etc/apt/sources.list.d/nvidia-container-toolkit.sources").content_string
    assert "Signed-By: /etc/apt/keyrings/nvidia-container-toolkit.asc" in source


def test_legacy_hook_is_not_installed(host: Host) -> None:
    assert not host.package("nvidia-container-toolkit").is_installed
    assert not host.package("libnvidia-container1").is_installed
