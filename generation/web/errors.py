"""How the API refuses a request."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """Becomes the JSON answer ``{"error": {"field", "message", "limit"}}``."""

    def __init__(
        self, status: int, field: str | None, message: str, limit: Any = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.message, self.limit = status, field, message, limit
        self.retry_after = retry_after
