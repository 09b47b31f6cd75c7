"""MODEL of the command line -> a folder and its config.json; the network is never used."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from hetero.errors import ModelFolderError
from hetero.model_folder import parse_json, printable, read_json
from planner.errors import ModelSpecError
from planner.model_profile import read_model_profile
from planner.model_spec import Dtype, ModelSpec

DEMO_NAME = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that was found: `folder` is None where only its shapes are known."""

    name: str
    folder: Path | None
    config: dict[str, Any]


def find_model(name: str | None = None, *, hub_cache: Path | None = None) -> ModelSource:
    """Find a model by what a user calls it.

    Parameters
    ----------
    name : str, optional
        In this order: None or "demo" (the small model inside the package), an existing folder, a
        name of `profiles/models/` in capitals or not (shapes without weights), `org/name` in the
        local Hugging Face cache.
    hub_cache : Path, optional
        The cache to search, usually `default_hub_cache(os.environ)`; None searches none.

    Raises
    ------
    ModelFolderError
        Nothing was found (the message lists what was tried, and the nearest names), or the
        folder's config.json is missing or is not a JSON object.
    """
    if name is None or name == DEMO_NAME:
        return _from_folder(_demo_folder(), DEMO_NAME)
    if not name or "\0" in name or len(name) > 4096:
        raise ModelFolderError(f"{printable(name)} is not a model name or folder")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _from_folder(path, path.resolve().name)
        if path.exists():
            raise ModelFolderError(f"{path} is a file; give the folder that holds config.json")
    except (OSError, RuntimeError) as error:  # no permission, name too long, unknown ~user
        raise ModelFolderError(f"cannot look at {printable(name)}: {error}") from None
    profiles = _model_profiles()
    if name.lower() in profiles:
        return _from_profile(profiles[name.lower()])
    tried = [f"no folder {path}", f"no model profile {name}"]
    if _HUB_ID.fullmatch(name) and ".." not in name and hub_cache is not None:
        snapshot = _hub_snapshot(name, hub_cache)
        if snapshot is not None:
            return _from_folder(snapshot, name)
        tried.append(f"not in the Hugging Face cache {hub_cache} (nothing is downloaded)")
    raise ModelFolderError(
        f"model {printable(name)} was not found: {'; '.join(tried)}. Give a folder with "
        f"config.json, a downloaded org/name, or {_nearest(name, (DEMO_NAME, *profiles))}"
    )


def read_model_spec(source: ModelSource, dtype: Dtype | None = None) -> ModelSpec:
    """The shapes of a model that was found; `dtype` overrides the one of its config.

    Raises
    ------
    ModelFolderError
        The configuration is incomplete, out of range or of a family that is not supported.
    """
    try:
        if source.folder is None and "architectures" not in source.config:
            return read_model_profile(source.config).spec(dtype)
        return ModelSpec.from_config(source.config, name=source.name, dtype=dtype)
    except ModelSpecError as error:
        where = source.folder or f"model profile {source.name}"
        raise ModelFolderError(f"{where}: {error}") from None


def model_names() -> tuple[str, ...]:
    """Names of the models whose shapes ship in `profiles/models/`."""
    return tuple(_model_profiles())


def default_hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps downloads, from its environment variables."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _nearest(name: str, known: tuple[str, ...]) -> str:
    """The known names that look like one that is not, or all where none does."""
    found = difflib.get_close_matches(name.rpartition("/")[2].lower(), known, n=3)
    return f"the nearest names: {', '.join(found)}" if found else f"one of: {', '.join(known)}"


def _demo_folder() -> Path:
    return Path(str(resources.files("hetero") / "demo_model"))


def _model_profiles() -> dict[str, Traversable]:
    files = (resources.files("profiles") / "models").iterdir()
    found = {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}
    return dict(sorted(found.items()))


def _from_folder(folder: Path, name: str) -> ModelSource:
    config = read_json(folder, "config.json")
    if config is None:
        raise ModelFolderError(
            f"{folder} has no config.json; give a folder in Hugging Face layout (config.json, "
            "*.safetensors, tokenizer.json)"
        )
    return ModelSource(name=name, folder=folder, config=config)


def _from_profile(file: Traversable) -> ModelSource:
    config = parse_json(file.read_bytes(), Path(str(file)))
    return ModelSource(name=config["name"], folder=None, config=config)


def _hub_snapshot(hub_id: str, hub_cache: Path) -> Path | None:
    """The downloaded `main` revision of a repository, or None where there is no such repository."""
    repository = hub_cache / f"models--{hub_id.replace('/', '--')}"
    if not repository.is_dir():
        return None
    snapshots = repository / "snapshots"
    try:
        with open(repository / "refs" / "main", encoding="ascii") as file:
            revision = file.read(200).strip()
    except (OSError, UnicodeDecodeError):
        found = sorted(path.name for path in snapshots.glob("*"))[:5]
        raise ModelFolderError(
            f"{repository} has no readable refs/main; give the folder of a snapshot instead, "
            f"of these: {', '.join(found) or 'none, the download is incomplete'}"
        ) from None
    if not _REVISION.fullmatch(revision) or not (snapshots / revision).is_dir():
        raise ModelFolderError(
            f"{repository}/refs/main names revision {printable(revision)}, which is not in "
            f"{snapshots}; download the model again"
        )
    return snapshots / revision
