"""How the API refuses a request, and what it answers when one fails."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from generation.engine.engine import DeadlineExceeded, StageFailed, Unavailable


class ApiError(Exception):
    """Becomes the JSON answer ``{"error": {"field", "message", "limit"}}``."""

    def __init__(
        self, status: int, field: str | None, message: str, limit: Any = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.message, self.limit = status, field, message, limit
        self.retry_after = retry_after


def add_error_handlers(app: FastAPI) -> None:
    """Have each error answered with its status and the JSON of ``ApiError``."""

    def answer(
        request: Request, status: int, message: str, field: str | None = None, limit: Any = None, **headers: str
    ) -> JSONResponse:
        if (request_id := getattr(request.state, "request_id", None)) is not None:
            headers["X-Request-Id"] = request_id
        return JSONResponse({"error": {"field": field, "message": message, "limit": limit}}, status, headers)

    def retry(seconds: int | None) -> dict[str, str]:
        return {} if seconds is None else {"Retry-After": str(seconds)}

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return answer(request, error.status, error.message, error.field, error.limit, **retry(error.retry_after))

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return answer(request, 503, str(error), **retry(error.retry_after))

    @app.exception_handler(DeadlineExceeded)
    async def late(request: Request, error: DeadlineExceeded) -> Response:
        return answer(request, 504, str(error))

    @app.exception_handler(StageFailed)
    async def failed(request: Request, error: StageFailed) -> Response:
        return answer(request, 500, f"generation failed: {error}")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), **dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, 500, "internal error")
