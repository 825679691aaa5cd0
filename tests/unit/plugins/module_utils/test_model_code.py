"""What of the weights' own code is refused, with the profiles that the role really has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.dots_ocr.deploy.plugins.module_utils import model_code

REPOSITORY = Path(__file__).resolve().parents[4]
WEIGHTS = REPOSITORY / "rehearsal/tiny_model/dots.ocr"
PROFILES: dict[str, Any] = {}
for file in sorted((REPOSITORY / "roles/dots_ocr_server/profiles").glob("*.yml")):
    PROFILES.update(yaml.safe_load(file.read_text()))

# As the real weights name it.
KNOWN = {
    "AutoConfig": "configuration_dots.DotsOCRConfig",
    "AutoModelForCausalLM": "modeling_dots_ocr.DotsOCRForCausalLM",
}
ALLOWED = ["configuration_dots", "modeling_dots_ocr.DotsOCRForCausalLM"]


def refused(folder: Path, **files: Any) -> list[str]:
    """Write files, NAME for NAME.json, as JSON unless they are bytes already, and return what is refused."""
    for name, contents in files.items():
        (folder / f"{name}.json").write_bytes(
            contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        )
    result: list[str] = model_code.refused(folder, ALLOWED)
    return result


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_trusts_code_for_what_it_names_only(name: str) -> None:
    """The flag is there where something is named, and the weights that are served pass."""
    profile = PROFILES[name]
    assert ("--trust-remote-code" in profile["arguments"]) == bool(profile.get("remote_code"))
    assert model_code.refused(WEIGHTS, profile["remote_code"]) == []
    # What the profile's image would execute of a module is ours, or the whole model's code is trusted.
    assert profile["configuration_class"] or name == "rednote_v0_9_1"


def test_code_of_the_real_weights_passes(tmp_path: Path) -> None:
    processor = {"auto_map": {"AutoProcessor": "configuration_dots.DotsVLProcessor"}}
    assert refused(tmp_path, config={"auto_map": KNOWN}, preprocessor_config=processor, generation_config={}) == []


@pytest.mark.parametrize(
    ("where", "contents", "complaint"),
    [
        ("config", {"auto_map": {**KNOWN, "AutoModel": "evil.Model"}}, "config.json names evil.Model (AutoModel)"),
        ("config", {"vision_config": {"auto_map": {"AutoConfig": "e.C"}}}, "config.json names e.C (AutoConfig)"),
        ("config", {"parts": [{"auto_map": {"AutoConfig": "e.C"}}]}, "config.json names e.C (AutoConfig)"),
        ("config", {"auto_map": {"a": {"auto_map": "e.C"}}}, "config.json names e.C (auto_map)"),
        (
            "config",
            {"auto_map": {"AutoConfig": "evil/repo--configuration_dots.DotsOCRConfig"}},
            "config.json names evil/repo--configuration_dots.DotsOCRConfig (AutoConfig)",
        ),
        (
            "config",
            {"auto_map": {"AutoConfig": "a.configuration_dots.C"}},
            "config.json names a.configuration_dots.C (AutoConfig)",
        ),
        ("config", {"auto_map": {"AutoConfig": "configuration_dots"}}, None),
        ("config", {"auto_map": "evil.Model"}, "config.json names evil.Model (auto_map)"),
        ("config", {"auto_map": {"AutoConfig": 7}}, "config.json names 7 (AutoConfig)"),
        (
            "tokenizer_config",
            {"auto_map": {"AutoTokenizer": ["e.Slow", None]}},
            "tokenizer_config.json names e.Slow (AutoTokenizer)",
        ),
        ("processor_config", {"auto_map": {"AutoProcessor": "e.P"}}, "processor_config.json names e.P (AutoProcessor)"),
        ("anything", {"auto_map": {"AutoImageProcessor": "e.P"}}, "anything.json names e.P (AutoImageProcessor)"),
        ("config", {"architectures": ["Evil"]}, "config.json names the class Evil (architectures)"),
        ("config", {"architectures": ["DotsOCRForCausalLM", "E"]}, "config.json names the class E (architectures)"),
        ("config", {"architectures": "Evil"}, "config.json names the class Evil (architectures)"),
        ("config", {"architectures": ["DotsOCRForCausalLM"], "auto_map": KNOWN}, None),
        ("config", b'{"auto_map": {', "config.json cannot be read (JSONDecodeError)"),
        ("config", b"[" * 100_000, "config.json cannot be read (RecursionError)"),
        ("config", b"\xff\xfe", "config.json cannot be read (UnicodeDecodeError)"),
    ],
)
@pytest.mark.attack("weights that name code nobody has reviewed", "refused before anything changes")
def test_other_code_is_refused(tmp_path: Path, where: str, contents: Any, complaint: str | None) -> None:
    assert refused(tmp_path, **{where: contents}) == ([complaint] if complaint else [])


def test_data_of_the_tokenizer_is_not_searched(tmp_path: Path) -> None:
    assert refused(tmp_path, tokenizer={"auto_map": {"AutoTokenizer": "any.Any"}}) == []


def test_folder_that_is_not_there_names_nothing(tmp_path: Path) -> None:
    assert model_code.refused(tmp_path / "nowhere", ALLOWED) == []
