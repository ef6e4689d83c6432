"""Upload files to a model repository of the Hugging Face Hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, XetDownloadError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

from qat_edge.errors import HubError, UsageError
from qat_edge.models.hub import one_line, unreachable_reason

LOGIN = "Run `hf auth login`, or set HF_TOKEN, with a token of https://huggingface.co/settings/tokens that can write"
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, XetDownloadError, OSError, ValueError, RuntimeError)


def check_repo_id(repo_id: str) -> None:
    """Require the id of a repository, as NAME/MODEL.

    Raises:
        UsageError: it is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--repo-id {repo_id}: {one_line(error)}.") from error
    if "/" not in repo_id:
        raise UsageError(f"--repo-id {repo_id}: expected NAME/MODEL, with the name of a user or an organization.")


def upload(repo_id: str, files: Mapping[str, Path], private: bool, message: str) -> str:
    """Make the repository where it is missing, and add the files in one commit: all of them, or none.

    Args:
        repo_id: of the repository.
        files: by path in the repository. Its folders are replaced: other files in them are deleted.
        private: make a new repository private.
        message: of the commit.

    Returns:
        URL of the commit.

    Raises:
        HubError: no token, no network, no right to write there, or the Hub refused the files.
    """
    token = get_token()
    if token is None:
        raise HubError(f"No token for {constants.ENDPOINT}. {LOGIN}.")
    reason = unreachable_reason()
    if reason:
        raise HubError(f"{repo_id}: nothing was uploaded, the Hub cannot be reached ({reason}). Try again online.")

    api = HfApi(token=token)
    is_new = False
    try:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
            is_new = True
        folders = {name.partition("/")[0] for name in files if "/" in name}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id)
            if name.partition("/")[0] in folders and "/" in name and name not in files
        ]
        operations += [CommitOperationAdd(name, path) for name, path in files.items()]
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
    except FAILURES as error:
        raise HubError(_refusal(repo_id, error, is_new)) from error


def _refusal(repo_id: str, error: Exception, is_new: bool) -> str:
    """Return why nothing was uploaded, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    advice = {
        401: f"The token is not valid. {LOGIN}.",
        403: f"The token may not write there. Name a repository of your own, or use another token. {LOGIN}.",
        409: "Another commit came in between. Try again.",
    }.get(status or 0, "Try again; files that arrived are not sent twice.")
    left = f" The repository {repo_id} was created and is empty, or has its first commit alone." if is_new else ""
    return f"{repo_id}: nothing was uploaded ({one_line(error)}). {advice}{left}"
