"""The GPU is a CDI device, from a signed repository, without the legacy hook."""

from testinfra.host import Host


def test_gpu_is_a_cdi_device(host: Host) -> None:
    wsl = host.file("/dev/dxg").exists
    names = ["all"] if wsl else ["0", "GPU-00000000-0000-0000-0000-000000000000", "all"]
    assert host.check_output("nvidia-ctk cdi list").splitlines() == [f"nvidia.com/gpu={name}" for name in names]


def test_forward_compatibility_is_off_for_geforce(host: Host) -> None:
    wsl = host.file("/dev/dxg").exists
    specification = host.file("/var/run/cdi/nvidia.yaml").content_string
    assert "update-ldcache" in specification
    assert "enable-cuda-compat" not in specification
    settings = host.file("/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env").content_string
    assert ("DISABLED_HOOKS" in settings) == (not wsl)


def test_container_has_started_with_it_and_left_nothing(host: Host) -> None:
    assert host.file("/run/dots-ocr-gpu-devices").exists
    assert host.check_output("docker ps --all --quiet; docker images --all --quiet") == ""


def test_specification_is_refreshed_at_boot_and_on_changes(host: Host) -> None:
    assert host.service("nvidia-cdi-refresh.service").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_running


def test_repository_is_signed_by_its_own_key_and_the_older_entry_is_gone(host: Host) -> None:
    source = host.file("/etc/apt/sources.list.d/nvidia-container-toolkit.sources").content_string
    assert "Signed-By: /etc/apt/keyrings/nvidia-container-toolkit.gpg" in source
    assert not host.file("/etc/apt/sources.list.d/nvidia-container-toolkit.list").exists


def test_package_is_held(host: Host) -> None:
    assert "nvidia-container-toolkit-base" in host.check_output("apt-mark showhold").split()


def test_legacy_hook_is_not_installed(host: Host) -> None:
    assert not host.package("nvidia-container-toolkit").is_installed
    assert not host.package("libnvidia-container1").is_installed
