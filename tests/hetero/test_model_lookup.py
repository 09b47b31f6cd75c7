"""find_model: what a user may call a model, and what a broken config.json is answered with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hetero.errors import ExitCode, ModelFolderError
from hetero.model_lookup import default_hub_cache, find_model, model_names, read_model_spec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 10,
}


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def lookup_error(name: str, **arguments: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        read_model_spec(find_model(name, **arguments))
    assert caught.value.exit_code == ExitCode.MODEL_INVALID
    return str(caught.value)


def test_a_folder_is_read(tmp_path: Path) -> None:
    """The folder's name is the model's name; the dtype can be overridden."""
    source = find_model(str(write_config(tmp_path / "toy", CONFIG)))
    assert (source.name, source.folder) == ("toy", tmp_path / "toy")
    spec = read_model_spec(source, dtype="bfloat16")
    assert (spec.name, spec.num_layers, spec.dtype) == ("toy", 2, "bfloat16")


@pytest.mark.parametrize("name", model_names())
def test_a_model_profile_is_found_by_name_without_a_folder(name: str) -> None:
    """Names of profiles/models give shapes only."""
    source = find_model(name)
    assert source.folder is None
    assert read_model_spec(source).name == name


def test_no_name_and_demo_are_the_shipped_model() -> None:
    """With no MODEL the model inside the package is used."""
    try:
        source = find_model()
    except ModelFolderError as error:
        assert "demo_model has no config.json" in str(error)
        pytest.skip("the demo model is not in this checkout")
    assert source == find_model("demo")
    assert source.folder is not None
    assert (source.name, source.folder.name) == ("demo", "demo_model")


def test_a_folder_goes_before_a_profile_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk is what the user means."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "qwen3-8b", CONFIG)
    assert find_model("qwen3-8b").folder == Path("qwen3-8b")


def make_hub_model(cache: Path, revision: str = "0123abcd") -> Path:
    repository = cache / "models--org--name.v1"
    blobs, refs = repository / "blobs", repository / "refs"
    blobs.mkdir(parents=True)
    refs.mkdir()
    (refs / "main").write_text(revision)
    (blobs / "f00d").write_text(json.dumps(CONFIG))
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/f00d")
    return snapshot


def test_a_downloaded_model_is_found_in_the_hub_cache(tmp_path: Path) -> None:
    """org/name leads to the snapshot of refs/main, through its links into blobs."""
    snapshot = make_hub_model(tmp_path)
    source = find_model("org/name.v1", hub_cache=tmp_path)
    assert (source.name, source.folder) == ("org/name.v1", snapshot)
    assert read_model_spec(source).hidden_size == 16


def test_a_hub_model_that_is_not_downloaded_is_not_fetched(tmp_path: Path) -> None:
    """The answer lists what was tried and the models that are known."""
    message = lookup_error("org/other", hub_cache=tmp_path)
    assert f"not in the Hugging Face cache {tmp_path} (nothing is downloaded)" in message
    assert "no folder org/other" in message
    assert f"one of: demo, {', '.join(model_names())}" in message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("qwen3-8", "qwen3-8b"),
        ("DeepSeek-V3.1", "deepseek-v3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("mixtral", "mixtral-8x7b"),
    ],
)
def test_a_name_that_is_not_known_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    """A few names that look alike, not all of them."""
    message = lookup_error(name)
    assert nearest in message.partition("the nearest names: ")[2].split(", ")
    assert len(message.partition("the nearest names: ")[2].split(", ")) <= 3


def test_a_model_profile_is_found_in_capitals_too() -> None:
    """Makers write names as they like."""
    assert find_model("Qwen3-8B") == find_model("qwen3-8b")
    assert read_model_spec(find_model("DeepSeek-V3")).name == "deepseek-v3"


def test_a_folder_of_a_model_that_can_be_planned_only_is_refused(tmp_path: Path) -> None:
    """Neither its own config.json nor the file of a profile makes a folder one that can be run."""
    config = CONFIG | {"architectures": ["DeepseekV3ForCausalLM"]}
    message = lookup_error(str(write_config(tmp_path / "a", config)))
    assert "architecture 'DeepseekV3ForCausalLM' is not supported; supported: Llama" in message
    profile = find_model("deepseek-v3").config
    message = lookup_error(str(write_config(tmp_path / "b", profile)))
    assert "architectures is missing; supported: Llama" in message


@pytest.mark.parametrize("revision", ["../../../..", "/etc", "gone", "", "a b", "x" * 300, "\0"])
def test_a_hub_reference_that_leads_elsewhere_is_refused(tmp_path: Path, revision: str) -> None:
    """refs/main names a snapshot of the same repository."""
    make_hub_model(tmp_path, revision)
    message = lookup_error("org/name.v1", hub_cache=tmp_path)
    assert "refs/main names revision" in message
    assert message.isprintable()


def test_a_hub_model_without_a_main_revision_lists_its_snapshots(tmp_path: Path) -> None:
    """A download of another branch is given as a folder."""
    snapshot = make_hub_model(tmp_path)
    (snapshot.parents[1] / "refs" / "main").unlink()
    assert "of these: 0123abcd" in lookup_error("org/name.v1", hub_cache=tmp_path)


@pytest.mark.parametrize("name", ["../x/y", "/abs/x", "a/b/c", "org/..", "-x/y", "org/na me"])
def test_a_name_that_is_no_hub_id_is_not_looked_up_in_the_cache(tmp_path: Path, name: str) -> None:
    """Nothing of the name reaches the file system as a path into the cache."""
    assert "cache" not in lookup_error(name, hub_cache=tmp_path)


@pytest.mark.parametrize("name", ["", "x\0y", "x" * 300, "x" * 5000, "~no-such-user/x", "\x1b[31m"])
def test_a_name_that_no_file_system_takes_is_an_error(name: str) -> None:
    """Odd names end in the same kind of error."""
    lookup_error(name)


def test_default_hub_cache_follows_the_hub_client() -> None:
    """HF_HUB_CACHE, then HF_HOME/hub, then XDG_CACHE_HOME, then ~/.cache."""
    home = {"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}
    assert default_hub_cache({"HF_HUB_CACHE": "/c", **home}) == Path("/c")
    assert default_hub_cache(home) == Path("/h/hub")
    assert default_hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert default_hub_cache({}) == Path.home() / ".cache/huggingface/hub"


BROKEN: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "config.json is not JSON"),
    "empty": ("", "config.json is not JSON"),
    "list": ("[]", "holds a JSON list but must hold an object"),
    "number": ("3", "holds a JSON int"),
    "too deep for us": ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
    "too deep for Python": ('{"a":' * 100_000, "nested deeper than 64 levels"),
    "too large": (json.dumps({"a": "x" * (1 << 20)}), "bytes but at most 1048576 are read"),
    "huge number": ('{"a": ' + "9" * 5000 + "}", "config.json is not JSON"),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "no architecture": ("{}", "architectures is missing; supported: LlamaForCausalLM"),
    "unknown architecture": (
        json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}),
        "architecture 'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM",
    ),
    "missing value": (
        json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}),
        "hidden_size is missing",
    ),
    "quantised": (
        json.dumps(CONFIG | {"quantization_config": {"bits": 4}}),
        "quantised checkpoints are not supported",
    ),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_named(tmp_path: Path, text: str, expected: str) -> None:
    """One sentence with the file and what is wrong with it."""
    folder = write_config(tmp_path / "toy", text)
    message = lookup_error(str(folder))
    assert expected in message
    assert str(folder) in message


def test_a_config_that_is_not_text_is_named(tmp_path: Path) -> None:
    """A byte that is no UTF-8 gives its place."""
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8 text: byte 7 is 0xff" in lookup_error(str(tmp_path))


def test_missing_things_are_told_apart(tmp_path: Path) -> None:
    """No folder, a file, a folder without config.json, a config.json that is a folder or a pipe."""
    assert "was not found: no folder" in lookup_error(str(tmp_path / "gone"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert "is a file; give the folder" in lookup_error(str(file))
    assert "has no config.json" in lookup_error(str(tmp_path))
    (tmp_path / "a" / "config.json").mkdir(parents=True)
    assert "not a regular file" in lookup_error(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "config.json")
    assert "not a regular file" in lookup_error(str(tmp_path / "b"))


def test_a_config_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A model folder cannot have other files of the user read."""
    write_config(tmp_path / "other", CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "other" / "config.json")
    assert "which is outside" in lookup_error(str(tmp_path / "model"))


def test_nothing_in_the_folder_is_executed_and_torch_is_not_imported(tmp_path: Path) -> None:
    """auto_map and files beside the config are data; planning a folder loads no torch."""
    tripwire = "import pathlib; pathlib.Path('executed').touch()"
    (tmp_path / "modeling_x.py").write_text(tripwire)
    (tmp_path / "sitecustomize.py").write_text(tripwire)
    write_config(
        tmp_path,
        CONFIG
        | {
            "auto_map": {"AutoConfig": "modeling_x.Config"},
            "_attn_implementation_internal": "modeling_x/kernel",
        },
    )
    code = (
        "import sys; from hetero.model_lookup import *; import hetero.checkpoint;"
        "read_model_spec(find_model(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules), sys.modules.keys()"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    assert not (tmp_path / "executed").exists()
    assert not (root / "executed").exists()
