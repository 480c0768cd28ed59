"""Which checkpoints are vouched for by signed commits.

A manifest's id is the hash of its bytes, and it names the hash of all data. So whoever signs the commit that brings a
manifest vouches for the weights. git itself checks the signature, against the keys that its settings allow:
``gpg.ssh.allowedSignersFile`` for SSH, a trusted key for GPG.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from castore.format.ids import ObjectId, hash_bytes
from castore.format.manifest import MAX_BYTES, Entry
from castore.repo import Repo
from castore.storage import git

_WHY = {
    "N": "git can't check its signature",
    "B": "its signature is wrong, or git can't check it",
    "U": "the key is good, and not one that git is told to trust",
    "X": "the signature has expired",
    "Y": "the key has expired",
    "R": "the key was revoked",
    "E": "git can't check the signature: the key isn't here",
    "G": "git verify-commit refuses it, as by gpg.minTrustLevel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vouched:
    """Who vouches for a checkpoint: ``signer`` of ``commit``, or nobody, for the ``reason`` that is given.

    ``git`` is what git says of a signature that it does not accept.
    """

    id: ObjectId
    run: str
    step: int
    signer: str = ""
    commit: str = ""
    reason: str = ""
    git: str = ""


def check_signatures(repo: Repo, entries: Sequence[Entry]) -> Iterator[Vouched]:
    """Yield for each entry who vouches for it: any signed commit in the history of HEAD that brought these very bytes.

    GitUnreadable when git can't be asked, as outside of a work tree.
    """
    bringers = _bringers(repo, entries)
    signatures = git.signatures(repo.root, list(dict.fromkeys(commit for ids in bringers.values() for commit in ids)))
    are_signers_known = git.knows_allowed_signers(repo.root)
    for entry in entries:
        about = functools.partial(Vouched, id=entry.id, run=entry.manifest.run, step=entry.manifest.step)
        commits = bringers[entry.id]
        good = next((commit for commit in commits if signatures[commit].is_good), None)
        if good is not None:
            yield about(signer=signatures[good].signer, commit=good)
        elif commits:
            signature = signatures[commits[-1]]
            reason = _reason(signature, are_signers_known=are_signers_known)
            yield about(commit=commits[-1], reason=reason, git=signature.words)
        else:
            yield about(reason="no commit in the history of HEAD brought it: commit it")


def _bringers(repo: Repo, entries: Sequence[Entry]) -> dict[ObjectId, list[str]]:
    """Return the commits that brought the very bytes of each entry, the newest first."""
    added = git.additions(repo.root, "manifests")
    candidates = {entry.id: added.get(f"manifests/{entry.manifest.file_name(entry.id)}", ()) for entry in entries}
    places = {blob: f"commit {commit}" for found in candidates.values() for commit, blob in found}
    # a larger one is no manifest, and must not keep the others from being read
    contents = git.blobs(repo.root, places, MAX_BYTES, leave_out_larger=True)
    return {
        entry_id: [commit for commit, blob in found if blob in contents and hash_bytes(contents[blob]) == entry_id]
        for entry_id, found in candidates.items()
    }


def _reason(signature: git.Signature, *, are_signers_known: bool) -> str:
    if not signature.is_signed:
        return "it has no signature"
    if signature.is_ssh and not are_signers_known:
        return "git isn't told whose keys to trust: `git config gpg.ssh.allowedSignersFile FILE`"
    return _WHY.get(signature.code, f"git says {signature.code}")
