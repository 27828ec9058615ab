"""Where a model's files are: a local directory, or a repository of the Hugging Face hub, fetched into its cache."""

import re
import shutil
from pathlib import Path

from lite_llm.errors import BadCheckpoint, SourceProblem

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_TWICE = "consolidated*"  # Mistral's repositories hold the weights once more under this name
_SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


class Source:
    """A model named by path or by hub id ("owner/name" or "owner/name@revision")."""

    def __init__(self, name: str):
        self.name = name
        path = Path(name).expanduser()
        self.local = path.exists() or not _REPOSITORY.fullmatch(name) or name.startswith((".", "~", "/"))
        if self.local and not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise BadCheckpoint(
                f"{name} {found}", "name a model directory, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
            )
        self._path = path

    def description(self) -> Path:
        """A directory with config, tokenizer and generation defaults, but perhaps without weights."""
        return self._path if self.local else self._fetch(_SMALL)

    def directory(self) -> Path:
        """The whole checkpoint; downloads, with the hub's progress bars, what is not yet cached."""
        return self._path if self.local else self._fetch([*_SMALL, "*.safetensors"])

    def _fetch(self, patterns: list[str]) -> Path:
        import huggingface_hub
        from huggingface_hub import errors

        repository, _, revision = self.name.partition("@")
        wanted = dict(repo_id=repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=[_TWICE])
        try:
            if "*.safetensors" in patterns:
                self._check_disk(huggingface_hub, repository, revision or None)
            return Path(huggingface_hub.snapshot_download(**wanted))
        except errors.GatedRepoError:
            raise SourceProblem(
                f"{repository} is gated", "accept its licence on its hub page, then run: hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise SourceProblem(f"{repository} has no revision {revision!r}") from None
        except errors.RepositoryNotFoundError:
            raise SourceProblem(
                f"{repository}: there is no such directory here, and no such public repository on the hub",
                "check the spelling; for a private one run: hf auth login",
            ) from None
        except errors.LocalEntryNotFoundError as error:
            raise SourceProblem(
                f"{repository} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
                "connect to the network, or name a local directory",
            ) from None
        except OSError as error:
            raise SourceProblem(f"{repository} cannot be fetched: {error}", "check the network and the disk") from None

    def _check_disk(self, hub, repository: str, revision: str | None) -> None:
        """Refuse a download that cannot fit, before it starts. What cannot be asked is not checked."""
        try:
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
        except Exception:  # offline: the download itself will say so, or find everything cached
            return
        cached = hub.try_to_load_from_cache
        need = sum(
            file.size or 0
            for file in info.siblings
            if file.rfilename.endswith(".safetensors")
            and not file.rfilename.startswith("consolidated")
            and not isinstance(cached(repository, file.rfilename, revision=info.sha), str)
        )
        cache = Path(hub.constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if need > free:
            raise SourceProblem(
                f"{repository} needs {need / 1e9:.1f} GB in {cache}; {free / 1e9:.1f} GB are free",
                "free some space, or set HF_HOME to a larger disk",
            )
