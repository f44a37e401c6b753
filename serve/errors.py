"""What a client is told went wrong: OpenAI's error object and its HTTP status.

In: a status and a sentence. Out: the response. Knows no model.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """The request cannot be answered. `retry_after`: seconds until it may be; `closes`: nothing more is read from this client;
    `more`: further fields of the error object.
    """

    def __init__(
        self, status: int, message: str, type: str = "", retry_after: int | None = None, closes: bool = False, **more: Any
    ):
        self.status, self.retry_after, self.closes = status, retry_after, closes or status in (408, 413)
        self.content = {"error": {"code": status, "message": message, "type": type or TYPES[status], **more}}
        super().__init__(message)

    def response(self) -> JSONResponse:
        """The error as a response. 408 and 413 close the connection, since the rest of the body may still arrive."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        if self.closes:
            headers["connection"] = "close"
        return JSONResponse(self.content, self.status, headers)
