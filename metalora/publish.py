"""Putting a Meta-Down or a person on the Hub, with a card and the licence that the base asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import MetaLoraError
from .files import CARD
from .hub import META_DOWN_FILES, plain_faults
from .identity import Identity
from .licence import front_matter, is_hub_id, notice
from .metadown import MetaDown

IDENTITY_FILE = "identity.safetensors"


def publish(source: str | Path, repo: str, private: bool = False) -> str:
    """Put a Meta-Down's folder or an identity file on the Hub, and return its address there.

    Raises MetaLoraError where it is neither, the name is none, the Hub refuses, or what is to be private would be public.
    """
    if not is_hub_id(repo):
        raise MetaLoraError(f"{repo} is no name on the Hub; those read owner/model.")
    if Path(source).suffix != ".safetensors":
        MetaDown.load(source)
        return _upload(Path(source), repo, private, META_DOWN_FILES, "Meta-Down")
    identity = Identity.load(source)
    with tempfile.TemporaryDirectory() as folder:
        identity.save(Path(folder) / IDENTITY_FILE)
        (Path(folder) / CARD).write_text(identity_card(identity, repo), encoding="utf-8")
        return _upload(Path(folder), repo, private, [IDENTITY_FILE, CARD], "Identity")


def _upload(folder: Path, repo: str, private: bool, files: list[str], message: str) -> str:
    from huggingface_hub import HfApi

    with plain_faults(repo, None):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # one that was there stays as it was
            raise MetaLoraError(f"{repo} is there already and public; make it private on the Hub first, or choose another name.")
        try:
            return str(api.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=files, commit_message=message).repo_url)
        except ValueError as error:  # the client's word for a card that the Hub does not take
            raise MetaLoraError(f"The Hub does not take {folder / CARD} ({error}); mend its head, or remove it.") from error


def identity_card(identity: Identity, repo: str) -> str:
    """The README.md of a published person, with the Hub's front matter."""
    i = identity
    learnt = "learnt as an ordinary LoRA" if i.is_plain else f"learnt on the Meta-Down {i.meta_down} ({i.meta_down_sha256})"
    return f"""---
{front_matter(i.base)}
tags: [meta-lora, lora, personalization]
---

# {repo.partition("/")[2]}

A person of the domain "{i.domain}" for the base model {i.base}, {learnt}, in {i.steps} steps.
It is meant to be used only as the person in it agreed to. It holds no photo and no embedding of a face.

    python -m metalora generate {IDENTITY_FILE} "a photo of {{person}} in a red cap" --output pictures --base {i.base}

- trigger words: {i.prompt_words}
- rank {i.rank}, base fingerprint {i.base_fingerprint}
- SHA-256 of the factors: {i.sha256}
{notice(i.base)}"""
