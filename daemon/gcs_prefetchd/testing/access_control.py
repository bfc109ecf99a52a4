"""Access control: bearer tokens, denied buckets, requester pays. Pure."""

from collections.abc import Mapping

from gcs_prefetchd.testing.counters import Kind
from gcs_prefetchd.testing.responses import Refusal

__all__ = ["Access"]

_PERMISSIONS = {
    Kind.MEDIA: "storage.objects.get",
    Kind.METADATA: "storage.objects.get",
    Kind.LIST: "storage.objects.list",
    Kind.BUCKET: "storage.buckets.get",
    Kind.UPLOAD: "storage.objects.create",
    Kind.DELETE: "storage.objects.delete",
}


class Access:
    """The credentials that the server requires of a request."""

    def __init__(self) -> None:
        self._tokens: dict[str | None, str] = {}
        self._denied: set[str] = set()
        self._requester_pays: set[str] = set()

    def require_token(self, token: str | None, bucket: str | None = None) -> None:
        """Require `Authorization: Bearer <token>` for one bucket or for all; None removes the requirement."""
        if token is None:
            self._tokens.pop(bucket, None)
        else:
            self._tokens[bucket] = token

    def deny(self, bucket: str) -> None:
        """Refuse every request with 403."""
        self._denied.add(bucket)

    def allow(self, bucket: str) -> None:
        """Undo `deny`."""
        self._denied.discard(bucket)

    def requester_pays(self, bucket: str) -> None:
        """Require `userProject=` in every request."""
        self._requester_pays.add(bucket)

    def token_to_give(self) -> str:
        """Return the token that the token endpoints issue: the one required for all buckets, else for any."""
        tokens = [self._tokens.get(None), *self._tokens.values(), "token-of-the-emulator"]
        return next(token for token in tokens if token is not None)

    def refusal(self, kind: Kind, bucket: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Refusal | None:
        """Return why a request is refused, or None."""
        authorization = headers.get("Authorization")
        permission = _PERMISSIONS.get(kind, "storage.objects.get")
        token = self._tokens.get(bucket, self._tokens.get(None))
        if token is not None and authorization is None:
            return _anonymous(permission)
        if token is not None and authorization != f"Bearer {token}":
            challenge = ("WWW-Authenticate", 'Bearer realm="https://accounts.google.com/", error="invalid_token"')
            return Refusal(401, "authError", "Invalid Credentials", "AuthenticationRequired", (challenge,))
        if bucket in self._denied:
            message = (
                f"reader@example.iam.gserviceaccount.com does not have {permission} access to the Google Cloud Storage "
                f"{_noun(permission)}. Permission '{permission}' denied on resource (or it may not exist)."
            )
            return Refusal(403, "forbidden", message, "AccessDenied")
        payer = query.get("userProject") or headers.get("x-goog-user-project")
        if bucket in self._requester_pays and not payer:
            message = "Bucket is a requester pays bucket but no user project provided."
            return Refusal(400, "required", message, "UserProjectMissing")
        return None


def _anonymous(permission: str) -> Refusal:
    message = (
        f"Anonymous caller does not have {permission} access to the Google Cloud Storage {_noun(permission)}. "
        f"Permission '{permission}' denied on resource (or it may not exist)."
    )
    challenge = ("WWW-Authenticate", 'Bearer realm="https://accounts.google.com/"')
    return Refusal(401, "required", message, "AuthenticationRequired", (challenge,))


def _noun(permission: str) -> str:
    return "object" if permission in {"storage.objects.get", "storage.objects.delete"} else "bucket"
