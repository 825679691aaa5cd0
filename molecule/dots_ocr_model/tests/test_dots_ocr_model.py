"""The weights of one commit are there, whole, and readable by the container's user."""

from testinfra.host import Host

HOME = "/var/lib/dots-ocr/models/dots-studio--dots_ocr"


def revision(host: Host) -> str:
    return host.file(f"{HOME}/refs/main").content_string.strip()


def test_commit_is_recorded(host: Host) -> None:
    assert len(revision(host)) == 40


def test_every_file_matches_the_manifest(host: Host) -> None:
    folder = f"{HOME}/{revision(host)}"
    assert host.run("cd %s && sha256sum --check --strict SHA256SUMS", folder).rc == 0
    listed = len(host.file(f"{folder}/SHA256SUMS").content_string.splitlines())
    assert listed == int(host.check_output("find %s -type f ! -name SHA256SUMS | wc -l", folder))
    assert host.file(f"{folder}/model.safetensors").mode == 0o644


def test_nothing_half_done_is_left(host: Host) -> None:
    assert host.check_output("find %s -name '*.incoming'", HOME) == ""


def test_folder_name_can_be_a_python_module(host: Host) -> None:
    assert "." not in f"{HOME}/{revision(host)}"
