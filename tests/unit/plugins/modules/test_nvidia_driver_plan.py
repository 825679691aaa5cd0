"""The module nvidia_driver_plan: packages, reboot, proof. Measuring is tested on hosts (molecule/nvidia_driver)."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import nvidia_driver_plan as module

GPU = {"index": 0, "name": "NVIDIA GeForce RTX 5070 Ti", "driver_version": "580.173.02"}
NO_DRIVER = {"loaded": "", "loaded_flavour": "", "installed": "", "flavour": ""}
GOOD_DRIVER = {"loaded": "580.173.02", "loaded_flavour": "open", "installed": "580.173.02", "flavour": "open"}
UBUNTU_KERNEL = {
    "linux-generic-hwe-24.04": "linux-image-generic-hwe-24.04 (= 6.14.0-33.33), linux-headers-generic-hwe-24.04",
    "linux-image-generic-hwe-24.04": "linux-image-6.14.0-33-generic, linux-modules-extra-6.14.0-33-generic",
    "linux-headers-generic-hwe-24.04": "linux-headers-6.14.0-33-generic",
    "linux-image-6.14.0-33-generic": "kmod",
}
DEBIAN_KERNEL = {
    "linux-image-amd64": "linux-image-6.12.48+deb13-amd64 (= 6.12.48-1)",
    "linux-image-6.12.48+deb13-amd64": "kmod",
}
UBUNTU_ARCHIVE = (
    "linux-modules-nvidia-580-server-open-generic-hwe-24.04",
    "linux-modules-nvidia-580-server-open-6.14.0-33-generic",
    "nvidia-headless-no-dkms-580-server-open",
    "nvidia-utils-580-server",
)
DEBIAN_ARCHIVE = ("linux-headers-6.12.48+deb13-amd64", "linux-headers-amd64")


def host(**changes: Any) -> dict[str, Any]:
    """Return an Ubuntu machine with Secure Boot and a GPU but no driver, with changes."""
    return {
        "platform": "bare_metal",
        "distribution": "ubuntu",
        "distribution_version": "24.04",
        "kernel_release": "6.14.0-33-generic",
        "secure_boot": True,
        "nvidia_pci_devices": 1,
        "nvidia_pci_ids": ["0x2c05"],
        "nvidia_smi": None,
        "nvidia_smi_message": "",
        "nvidia_packages": [],
        "nouveau": False,
        "driver": NO_DRIVER,
        "gpus": [],
        **changes,
    }


def debian(**changes: Any) -> dict[str, Any]:
    """Return a Debian machine with a GPU but no driver, with changes."""
    return host(
        **{
            "distribution": "debian",
            "distribution_version": "13",
            "kernel_release": "6.12.48+deb13-amd64",
            "secure_boot": False,
            **changes,
        }
    )


def running(**changes: Any) -> dict[str, Any]:
    """Return a Debian machine whose driver works, with changes."""
    return debian(**{"driver": GOOD_DRIVER, "gpus": [GPU], "nvidia_smi": "/usr/bin/nvidia-smi", **changes})


def system(**changes: Any) -> Any:
    """Return what apt says on a machine that has the packages it needs on offer, with changes."""
    found = {
        "packages": {**UBUNTU_KERNEL, **DEBIAN_KERNEL},
        "configured": frozenset(),
        "available": frozenset((*UBUNTU_ARCHIVE, *DEBIAN_ARCHIVE)),
        "owned": False,
        "reboot_wanted_by": (),
        "booted_since": False,
        **changes,
    }
    return module.System(**found)


def wishes(branch: str = "auto", package_version: str = "", source: str = "auto") -> Any:
    """Return wishes."""
    return module.Wishes(branch, package_version, source)


def plan(machine: dict[str, Any], apt: Any = None, wanted: Any = None) -> dict[str, Any]:
    """Return the plan."""
    found: dict[str, Any] = module.make_plan(machine, apt or system(), wanted or wishes())
    return found


def refusal(machine: dict[str, Any], apt: Any = None, wanted: Any = None) -> str:
    """Return why there is no plan."""
    with pytest.raises(module.Problem) as caught:
        plan(machine, apt, wanted)
    assert ". Fix: " in str(caught.value)
    return str(caught.value)


class TestUbuntu:
    """Canonical's modules, also with Secure Boot."""

    def test_packages_follow_the_flavour_of_the_running_kernel(self) -> None:
        found = plan(host())
        assert set(found["packages"]) == set(UBUNTU_ARCHIVE)
        assert (found["repository"], found["pinning"], found["versions"]) == ("", "", {})

    def test_kernel_is_held_with_the_driver(self) -> None:
        assert plan(host())["kernel"] == [
            "linux-generic-hwe-24.04",
            "linux-image-generic-hwe-24.04",
            "linux-headers-generic-hwe-24.04",
        ]

    @pytest.mark.parametrize(
        ("metas", "expected"),
        [
            ({"linux-image-generic": "linux-image-6.14.0-33-generic"}, ["generic"]),
            ({"linux-image-generic": "linux-image-6.14.0-40-generic"}, ["generic"]),
            (
                {
                    "linux-image-generic": "linux-image-6.8.0-90-generic",
                    "linux-image-generic-hwe-24.04": "linux-image-6.14.0-33-generic (= 1)",
                },
                ["generic-hwe-24.04", "generic"],
            ),
            ({"linux-image-virtual": "linux-image-6.14.0-33-generic"}, ["virtual"]),
            ({"linux-image-lowlatency": "linux-image-6.14.0-33-lowlatency"}, []),
            ({"linux-image-generic": "linux-image-6.14.0-33-generic-64k"}, ["generic"]),
            ({}, []),
        ],
    )
    def test_flavour(self, metas: dict[str, str], expected: list[str]) -> None:
        assert module.flavours(host(), system(packages=metas)) == expected

    def test_oem_kernel(self) -> None:
        metas = {"linux-image-oem-24.04b": "linux-image-6.11.0-1030-oem"}
        assert module.flavours(host(kernel_release="6.11.0-1027-oem"), system(packages=metas)) == ["oem-24.04b"]

    def test_flavour_with_modules_is_preferred(self) -> None:
        apt = system(packages={**UBUNTU_KERNEL, "linux-image-a-virtual": "linux-image-6.14.0-33-generic"})
        assert "linux-modules-nvidia-580-server-open-generic-hwe-24.04" in plan(host(), apt)["packages"]

    def test_desktop_driver_if_the_enterprise_one_is_not_there(self) -> None:
        apt = system(available=frozenset(name.replace("-server", "") for name in UBUNTU_ARCHIVE))
        assert "linux-modules-nvidia-580-open-6.14.0-33-generic" in plan(host(), apt)["packages"]

    def test_no_module_for_the_running_kernel(self) -> None:
        lacking = frozenset(UBUNTU_ARCHIVE) - {"linux-modules-nvidia-580-server-open-6.14.0-33-generic"}
        text = refusal(host(), system(available=lacking))
        assert "for the running kernel 6.14.0-33-generic" in text
        assert "apt-get install linux-image-generic-hwe-24.04" in text

    def test_no_driver_of_this_branch(self) -> None:
        assert "choose another nvidia_driver_branch" in refusal(host(), wanted=wishes("999"))

    def test_kernel_of_ones_own(self) -> None:
        assert "apt-get install linux-generic" in refusal(host(kernel_release="7.0.0-mine"), system(packages={}))

    def test_version_cannot_be_chosen(self) -> None:
        assert "leave it empty" in refusal(host(), wanted=wishes("580", "580.173.02"))

    def test_other_branch_replaces_ours(self) -> None:
        ours = ["nvidia-utils-580-server", "libnvidia-compute-580-server", "nvidia-prime"]
        apt = system(owned=True, available=frozenset(name.replace("580", "595") for name in UBUNTU_ARCHIVE))
        found = plan(host(driver=GOOD_DRIVER, gpus=[GPU], nvidia_packages=ours), apt, wishes("595"))
        assert found["replace"] == ["nvidia-utils-580-server", "libnvidia-compute-580-server"]
        assert "nvidia-utils-595-server" in found["packages"]

    def test_archive_without_the_default_branch(self) -> None:
        machine = host(distribution_version="26.04")
        apt = system(available=frozenset(name.replace("580", "595") for name in UBUNTU_ARCHIVE))
        found = plan(machine, apt)
        assert (found["branch"], found["repository"]) == ("595", "")
        assert "linux-modules-nvidia-595-server-open-6.14.0-33-generic" in found["packages"]
        assert "choose another nvidia_driver_branch (there is 595)" in refusal(machine, apt, wishes("580"))

    def test_archive_with_both_branches(self) -> None:
        newer = (name.replace("580", "595") for name in UBUNTU_ARCHIVE)
        assert plan(host(), system(available=frozenset((*UBUNTU_ARCHIVE, *newer))))["branch"] == "580"

    def test_archive_that_is_not_known_yet(self) -> None:
        assert "apt has no linux-modules-nvidia-580-server-open" in refusal(host(), system(available=frozenset()))

    def test_cuda_repository_on_request(self) -> None:
        apt = system(available=frozenset({"linux-headers-6.14.0-33-generic"}))
        machine = host(secure_boot=False)
        old, new = (plan(machine, apt, wishes(branch, source="cuda_repo")) for branch in ("580", "595"))
        assert (old["repository"], old["pinning"]) == ("ubuntu2404", "nvidia-driver-pinning-580")
        assert "nvidia-dkms-580-open" in old["packages"]
        assert "nvidia-dkms-open" in new["packages"]

    def test_cuda_repository_with_secure_boot(self) -> None:
        assert "set nvidia_driver_source to 'ubuntu'" in refusal(host(), wanted=wishes(source="cuda_repo"))


class TestDebian:
    """NVIDIA's repository."""

    def test_packages(self) -> None:
        found = plan(debian())
        assert found["packages"] == [
            "nvidia-driver-cuda",
            "nvidia-kernel-open-dkms",
            "linux-headers-6.12.48+deb13-amd64",
            "linux-headers-amd64",
        ]
        assert found["missing"] == found["packages"]
        assert (found["repository"], found["pinning"]) == ("debian13", "nvidia-driver-pinning-595")
        assert found["versions"]["nvidia-driver-cuda"] == found["versions"]["libnvidia-*"] == "595.*"
        # The headers are yet to come, and a second run must not find another plan.
        assert found["kernel"] == ["linux-image-amd64", "linux-headers-amd64"]

    def test_exact_version(self) -> None:
        found = plan(debian(), wanted=wishes(package_version="595.71.05"))
        assert (found["branch"], found["pinning"]) == ("595", "nvidia-driver-pinning-595.71.05")
        assert found["versions"]["nvidia-*"] == "595.71.05-*"

    @pytest.mark.parametrize(
        ("distribution", "release", "branch", "key", "fingerprint"),
        [
            ("debian", "12", "580", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
            ("debian", "13", "595", "8793F200.pub", "02182E60104FCDC26EAE1B8597A5D4CB8793F200"),
            ("ubuntu", "22.04", "580", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
            ("ubuntu", "24.04", "580", "3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC"),
            ("ubuntu", "26.04", "595", "60DF8A40.pub", "14BAFBC7562AD710CA04E69905FBB6DA60DF8A40"),
        ],
    )
    def test_key_and_branch_of_the_folder(
        self, distribution: str, release: str, branch: str, key: str, fingerprint: str
    ) -> None:
        machine = debian(distribution=distribution, distribution_version=release)
        found = plan(machine, wanted=wishes(source="cuda_repo"))
        assert (found["branch"], found["pinning"]) == (branch, f"nvidia-driver-pinning-{branch}")
        assert found["key"] == {"file": key, "fingerprint": fingerprint}

    def test_branch_that_the_folder_does_not_have(self) -> None:
        text = refusal(debian(), wanted=wishes("580"))
        assert "NVIDIA's repository for debian13 has no branch 580: it begins at 590" in text
        assert "set nvidia_driver_branch to '595' or 'auto'" in text
        assert plan(debian(), wanted=wishes("615"))["branch"] == "615"

    def test_branch_that_came_since(self) -> None:
        apt = system(available=frozenset((*DEBIAN_ARCHIVE, "nvidia-driver-pinning-580")))
        assert plan(debian(), apt, wishes("580"))["pinning"] == "nvidia-driver-pinning-580"

    @pytest.mark.parametrize("version", ["580.173.02", "595.71.05", "615.71.09"])
    def test_what_we_installed_stays_on_its_branch(self, version: str) -> None:
        driver = {**GOOD_DRIVER, "loaded": version, "installed": version}
        machine = running(driver=driver, gpus=[{**GPU, "driver_version": version}])
        found = plan(machine, system(owned=True))
        assert (found["branch"], found["faults"]) == (version[:3], [])

    def test_what_we_installed_before_there_was_a_floor_is_replaced(self) -> None:
        driver = {**GOOD_DRIVER, "loaded": "575.57.08", "installed": "575.57.08"}
        assert plan(running(driver=driver), system(owned=True))["branch"] == "595"

    def test_other_branches_are_let_go(self) -> None:
        apt = system(owned=True, packages={**DEBIAN_KERNEL, "nvidia-driver-pinning-580": ""},
                     configured=frozenset({"nvidia-driver-pinning-595"}))  # fmt: skip
        assert plan(running(), apt)["unpin"] == ["nvidia-driver-pinning-595"]
        assert plan(running(), apt, wishes("595"))["unpin"] == ["nvidia-driver-pinning-580"]

    def test_secure_boot(self) -> None:
        text = refusal(debian(secure_boot=True))
        assert "MOK" in text
        assert "turn Secure Boot off in the firmware" in text
        assert "mokutil --import" in text

    def test_secure_boot_with_an_enrolled_key(self) -> None:
        assert plan(running(secure_boot=True), system(owned=True))["faults"] == []

    def test_driver_that_was_installed_by_hand_with_secure_boot_is_left_alone(self) -> None:
        assert not plan(running(secure_boot=True))["install"]

    def test_no_headers_for_the_running_kernel(self) -> None:
        text = refusal(debian(), system(available=frozenset({"linux-headers-amd64"})))
        assert "apt has no linux-headers-6.12.48+deb13-amd64 for the running kernel" in text

    def test_kernel_of_another_name(self) -> None:
        machine = debian(kernel_release="6.6.87.2-Custom_WSL2")
        apt = system(available=frozenset({"linux-headers-6.6.87.2-custom-wsl2"}), packages={})
        assert plan(machine, apt)["packages"][-1] == "linux-headers-6.6.87.2-custom-wsl2"

    def test_kernel_of_proxmox(self) -> None:
        text = refusal(debian(kernel_release="6.14.11-4-pve"), system(packages={}))
        assert "the driver belongs to the Proxmox machine" in text
        assert "linux-image-amd64" not in text

    def test_ubuntu_as_the_source(self) -> None:
        assert "but this is debian 13" in refusal(debian(), wanted=wishes(source="ubuntu"))


class TestRefusals:
    """Machines and wishes for which there is no driver."""

    @pytest.mark.parametrize(
        ("machine", "wanted", "cause"),
        [
            (debian(distribution_version="11"), wishes(), "no source of drivers for debian 11"),
            (debian(distribution="fedora", distribution_version="44"), wishes(), "no source of drivers for fedora 44"),
            (debian(nvidia_pci_ids=["0x1b80"]), wishes(), "older than Turing"),
            (debian(nvidia_pci_devices=0, nvidia_pci_ids=[]), wishes(), "no NVIDIA GPU in this machine"),
            (debian(nvidia_pci_devices=0, nvidia_pci_ids=[],
                    nvidia_pci_reserved=[{"address": "0000:01:00.0", "device": "0x2c05", "driver": "vfio-pci"}]),
             wishes(), "the NVIDIA GPU at 0000:01:00.0 is kept for a virtual machine by vfio-pci"),
            (debian(platform="container"), wishes(), "this is a container"),
            (debian(), wishes("580-open"), "nvidia_driver_branch is '580-open'"),
            (debian(), wishes("580", "595.71.05"), "595.71.05 is not of branch 580"),
        ],
    )  # fmt: skip
    def test_cause(self, machine: dict[str, Any], wanted: Any, cause: str) -> None:
        assert cause in refusal(machine, wanted=wanted)

    def test_old_gpu_beside_a_new_one_is_no_reason(self) -> None:
        assert plan(debian(nvidia_pci_ids=["0x1b80", "0x2c05"], nvidia_pci_devices=2))["install"]


class TestForeign:
    """A driver that is not ours."""

    def test_good_one_is_left_alone(self) -> None:
        found = plan(running(nvidia_packages=["nvidia-driver-590"], driver={**GOOD_DRIVER, "flavour": ""}))
        assert (found["install"], found["packages"], found["faults"], found["reboot"]) == (False, [], [], "")

    def test_one_that_needs_a_reboot_only(self) -> None:
        driver = {**GOOD_DRIVER, "loaded": "580.159.03"}
        assert (
            "runs the NVIDIA module 580.159.03, but 580.173.02 is installed" in plan(running(driver=driver))["reboot"]
        )

    def test_old_one(self) -> None:
        old = {"loaded": "550.163.01", "loaded_flavour": "open", "installed": "550.163.01", "flavour": "open"}
        packages = ["nvidia-driver", "nvidia-kernel-open-dkms"]
        text = refusal(running(driver=old, nvidia_packages=packages))
        assert "NVIDIA driver 550.163.01 was installed by others (nvidia-driver, nvidia-kernel-open-dkms)" in text
        assert "apt-get purge nvidia-driver nvidia-kernel-open-dkms" in text

    def test_one_of_the_run_program(self) -> None:
        old = {"loaded": "550.163.01", "loaded_flavour": "open", "installed": "550.163.01", "flavour": "open"}
        text = refusal(running(driver=old))
        assert "NVIDIA's .run program" in text
        assert "nvidia-uninstall" in text

    def test_proprietary_one_that_shows_no_gpu(self) -> None:
        driver = {**GOOD_DRIVER, "flavour": "proprietary", "loaded_flavour": "proprietary"}
        machine = running(driver=driver, gpus=[], nvidia_packages=["nvidia-driver-580"])
        assert "Blackwell needs the open modules" in refusal(machine)

    def test_proprietary_one_that_works(self) -> None:
        driver = {**GOOD_DRIVER, "flavour": "proprietary", "loaded_flavour": "proprietary"}
        assert plan(running(driver=driver, nvidia_pci_ids=["0x2684"]))["faults"] == []

    @pytest.mark.parametrize(("capability", "good"), [("8.9", True), ("6.1", False)])
    def test_proprietary_one_beside_blackwell(self, capability: str, good: bool) -> None:
        driver = {**GOOD_DRIVER, "flavour": "proprietary", "loaded_flavour": "proprietary"}
        machine = running(driver=driver, gpus=[{**GPU, "compute_capability": capability}],
                          nvidia_pci_devices=2, nvidia_pci_ids=["0x2684", "0x2c05"])  # fmt: skip
        assert module.foreign_is_good(machine, wishes("580")) == good

    def test_remains_without_a_module(self) -> None:
        assert "brought no module" in refusal(debian(nvidia_packages=["libnvidia-compute-570"]))

    def test_other_version_than_wished(self) -> None:
        assert "580.159.03 is needed" in refusal(running(), wanted=wishes("580", "580.159.03"))


class TestReboot:
    """When the driver cannot work before one."""

    def reason(self, apt: Any = None, **changes: Any) -> str:
        """Return the reason for our own driver."""
        return str(plan(running(**changes), apt or system(owned=True))["reboot"])

    def test_none(self) -> None:
        assert self.reason() == ""

    def test_nouveau(self) -> None:
        assert "nouveau holds the GPU" in self.reason(nouveau=True)

    def test_nouveau_before_anything_is_installed(self) -> None:
        assert plan(debian(nouveau=True))["reboot"] == "the module nouveau holds the GPU"

    def test_module_is_not_loaded(self) -> None:
        driver = {**GOOD_DRIVER, "loaded": "", "loaded_flavour": ""}
        assert "installed but not loaded" in self.reason(driver=driver, gpus=[])

    def test_module_was_not_loaded_by_the_boot(self) -> None:
        driver = {**GOOD_DRIVER, "loaded": "", "loaded_flavour": ""}
        machine = host(driver=driver, secure_boot=True)
        found = plan(machine, system(owned=True, booted_since=True))
        assert found["reboot"] == ""
        assert "the kernel did not load the NVIDIA module 580.173.02, and Secure Boot is on" in found["faults"]

    def test_libraries(self) -> None:
        message = "Failed to initialize NVML: Driver/library version mismatch"
        assert "libraries do not fit" in self.reason(gpus=[], nvidia_smi_message=message)

    def test_package_asks_for_it(self) -> None:
        apt = system(owned=True, reboot_wanted_by=("linux-base", "nvidia-driver-libs"))
        assert self.reason(apt) == "nvidia-driver-libs asked for a reboot"

    def test_new_kernel_alone_is_no_reason(self) -> None:
        assert self.reason(system(owned=True, reboot_wanted_by=("linux-image-6.12.50",))) == ""


class TestProof:
    """What is wrong with a driver that is ours."""

    def faults(self, wanted: Any = None, **changes: Any) -> str:
        """Return the faults."""
        return "; ".join(plan(running(**changes), system(owned=True), wanted)["faults"])

    def test_none(self) -> None:
        assert self.faults() == ""

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"gpus": [], "gpus_broken": [{"index": 0, "name": "RTX 3060", "fault": "memory.total is [GPU is lost]"}]},
             "nvidia-smi shows no GPU (GPU 0 RTX 3060: memory.total is [GPU is lost])"),
            ({"gpus": [], "nvidia_smi_message": "No devices were found"}, "shows no GPU (No devices were found)"),
            ({"gpus": [], "nvidia_smi": None}, "there is no nvidia-smi"),
            ({"driver": {**GOOD_DRIVER, "flavour": "proprietary"}}, "proprietary by its licence, not open"),
            ({"gpus": [{**GPU, "driver_version": "580.159.03"}]}, "580.159.03 is shown by nvidia-smi"),
            ({"driver": NO_DRIVER, "gpus": []}, "no NVIDIA module is installed for the running kernel"),
        ],
    )  # fmt: skip
    def test_fault(self, changes: dict[str, Any], fault: str) -> None:
        assert fault in self.faults(**changes)

    @pytest.mark.parametrize("other", ["0x1b81", "0x2504"])
    def test_card_that_does_not_answer_beside_one_that_does(self, other: str) -> None:
        assert self.faults(nvidia_pci_devices=2, nvidia_pci_ids=[other, "0x2c05"]) == ""

    def test_branch(self) -> None:
        assert "the driver is 580.173.02, wanted is branch 595" in self.faults(wishes("595"))
