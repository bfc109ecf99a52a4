"""Access tokens: Google's token endpoint and the metadata server of a GCE machine."""

from collections.abc import Mapping

from multidict import CIMultiDict

from gcs_prefetchd.testing.responses import Response, json_response

__all__ = ["is_token_path", "token_response"]

LIFETIME_S = 3600
_METADATA = "/computeMetadata/v1/"
_ACCOUNT = _METADATA + "instance/service-accounts/default/"


def is_token_path(path: str) -> bool:
    """Return whether a path belongs to the token endpoint or the metadata server."""
    return path == "/token" or path.startswith(_METADATA)


def token_response(method: str, path: str, headers: Mapping[str, str], token: str) -> Response:
    """Return the endpoint's response with `token`, or whatever else clients request from a metadata server."""
    given = {"access_token": token, "expires_in": LIFETIME_S, "token_type": "Bearer"}
    if path == "/token":
        return json_response(given) if method == "POST" else json_response({"error": "invalid_request"}, 400)
    if headers.get("Metadata-Flavor", "").lower() != "google":
        return Response(403, CIMultiDict({"Content-Type": "text/html"}), b"Missing Metadata-Flavor:Google header.")
    if path == _ACCOUNT + "token":
        response = json_response(given)
    elif path == _ACCOUNT:
        response = json_response({"aliases": ["default"], "email": "default", "scopes": []})
    elif path == _METADATA + "project/project-id":
        response = Response(200, CIMultiDict({"Content-Type": "application/text"}), b"test-project")
    elif path == _METADATA:
        response = Response(200, CIMultiDict({"Content-Type": "application/text"}), b"instance/\nproject/\n")
    else:
        response = Response(404, CIMultiDict({"Content-Type": "text/html"}), b"Not Found")
    response.headers["Metadata-Flavor"] = "Google"
    return response
