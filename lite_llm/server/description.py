"""The API as an OpenAPI document: what routes take, and how they refuse. Bodies are read by handlers, not FastAPI."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lite_llm.server import schema

_REFUSALS = {
    400: "A field or the body cannot be used; `param` names the field",
    401: "The API key is missing or wrong; only on servers with a key",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The content-type is not application/json",
    429: "The queue is full; see Retry-After",
    500: "The step that computed this answer failed",
    503: "The server is loading or stopping, or an answer had not begun in time; see Retry-After",
}


class Error(BaseModel):
    """OpenAI's."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    error: Error


def refuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that says no in these ways."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Refused"}}}
    return {status: {"description": _REFUSALS[status], "content": content} for status in statuses}


READS = refuses(400, 401, 404, 408, 413, 415, 503)
ANSWERS = refuses(*_REFUSALS) | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def takes(name: str) -> dict[str, Any]:
    """A JSON body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"requestBody": {"required": True, "content": content}}


def description(app: FastAPI) -> dict[str, Any]:
    kinds = (schema.ChatRequest, schema.CompletionRequest, schema.TokenizeRequest, schema.DetokenizeRequest, Refused)
    _, models = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own: whatever stands in a path is a name here
    found["components"] = {"schemas": models["$defs"]}
    return found
