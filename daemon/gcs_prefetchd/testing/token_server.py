"""Where credentials get their access tokens: Google's token endpoint and the metadata server of a machine in GCE."""

from collections.abc import Mapping

from multidict import CIMultiDict

from gcs_prefetchd.testing.responses import Answer, json_answer

__all__ = ["is_token_path", "token_answer"]

LIFETIME_S = 3600
_METADATA = "/computeMetadata/v1/"
_ACCOUNT = _METADATA + "instance/service-accounts/default/"


def is_token_path(path: str) -> bool:
    """Tell whether a path is the token endpoint's or the metadata server's."""
    return path == "/token" or path.startswith(_METADATA)


def token_answer(method: str, path: str, headers: Mapping[str, str], token: str) -> Answer:
    """Return `token` as the endpoint gives it, or what else the clients ask of a metadata server."""
    given = {"access_token": token, "expires_in": LIFETIME_S, "token_type": "Bearer"}
    if path == "/token":
        return json_answer(given) if method == "POST" else json_answer({"error": "invalid_request"}, 400)
    if headers.get("Metadata-Flavor", "").lower() != "google":
        return Answer(403, CIMultiDict({"Content-Type": "text/html"}), b"Missing Metadata-Flavor:Google header.")
    if path == _ACCOUNT + "token":
        answer = json_answer(given)
    elif path == _ACCOUNT:
        answer = json_answer({"aliases": ["default"], "email": "default", "scopes": []})
    elif path == _METADATA + "project/project-id":
        answer = Answer(200, CIMultiDict({"Content-Type": "application/text"}), b"test-project")
    elif path == _METADATA:
        answer = Answer(200, CIMultiDict({"Content-Type": "application/text"}), b"instance/\nproject/\n")
    else:
        answer = Answer(404, CIMultiDict({"Content-Type": "text/html"}), b"Not Found")
    answer.headers["Metadata-Flavor"] = "Google"
    return answer
