"""Which checkpoints are vouched for by signed commits.

A manifest's id is the hash of its bytes, and it names the hash of all data. So whoever signs the commit that brings a
manifest vouches for the weights. git itself checks the signature, against the keys that its settings allow:
``gpg.ssh.allowedSignersFile`` for SSH, a trusted key for GPG.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from castore.format.ids import ObjectId, hash_bytes
from castore.format.manifest import MAX_BYTES, Entry
from castore.repo import Repo
from castore.storage import git

_WHY = {
    "N": "it has no signature",
    "B": "its signature is wrong",
    "U": "the key is good, and not one that git is told to trust",
    "X": "the signature has expired",
    "Y": "the key has expired",
    "R": "the key was revoked",
    "E": "git can't check the signature: the key isn't here",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vouched:
    """Who vouches for a checkpoint: ``signer`` of ``commit``, or nobody, for the ``reason`` that is given."""

    id: ObjectId
    run: str
    step: int
    signer: str = ""
    commit: str = ""
    reason: str = ""


def check_signatures(repo: Repo, entries: Iterable[Entry]) -> Iterator[Vouched]:
    """Yield for each entry who vouches for it: any signed commit in the history of HEAD that brought these very bytes.

    GitUnreadable when git can't be asked, as outside of a work tree.
    """
    added = git.additions(repo.root, "manifests")
    signatures: dict[str, git.Signature] = {}
    for entry in entries:
        manifest = entry.manifest
        about = functools.partial(Vouched, id=entry.id, run=manifest.run, step=manifest.step)
        commits = [
            (commit, blob)
            for commit, blob in added.get(f"manifests/{manifest.file_name(entry.id)}", ())
            if hash_bytes(git.blobs(repo.root, {blob: commit}, MAX_BYTES)[blob]) == entry.id
        ]
        for commit, _ in commits:
            if commit not in signatures:
                signatures[commit] = git.signature(repo.root, commit)
        good = next((commit for commit, _ in commits if signatures[commit].code == "G"), None)
        if good is not None:
            yield about(signer=signatures[good].signer, commit=good)
        elif commits:
            commit = commits[-1][0]
            code = signatures[commit].code
            yield about(commit=commit, reason=_WHY.get(code, f"git says {code}"))
        else:
            yield about(reason="no commit in the history of HEAD brought it: commit it")
