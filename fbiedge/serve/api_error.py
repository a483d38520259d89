"""A question that is not answered, in the words that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

# By status, as OpenAI names them; its Python client chooses the exception by the status alone.
_TYPES = {
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error. `param`: the field that is wrong; `code`: what a program can tell it by."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A question that can't be answered as it is."""
    return ApiError(400, message, param=param, code=code)
