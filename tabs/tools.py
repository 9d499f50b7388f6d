"""Tools for models: the named endpoints by MCP, as Gradio serves them at /gradio_api/mcp, where they fall short.

Each call is a visitor of its own, whose work ends when its connection does; pictures go from call to call by their ids.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import mimetypes
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import gradio as gr
import gradio.mcp
from gradio.processing_utils import save_bytes_to_cache
from gradio_client import Client
from gradio_client.utils import is_file_obj_with_meta

from ovam_core.errors import InputError

TOOLS = ("generate", "photograph", "attribute", "masks", "point", "optimize")
FILES = ("photo", "mask", "token_files")  # parameters that are files
SAID_TWICE = "additional_description"  # in schemas, beside "description"
VISITOR = "x-ovam-visitor"  # header by which Doors names the visitor of a call

PATIENCE = 60  # seconds for the page to answer itself, as Gradio hands on what tools are asked; its own 5 are few

NO_MCP = "The package mcp is not installed, so the page offers no tools by MCP: pip install 'gradio[mcp]' brings it."
NO_FILE = "This is no file: give a data: URL in base64, or the address of a file that another tool gave."

logger = logging.getLogger("ovam")


def can_serve_tools() -> bool:
    """Whether the package of the protocol is there; says in the log where it is not."""
    there = find_spec("mcp") is not None
    if not there:
        logger.warning(NO_MCP)
    return there


def visitor_of(request: Any) -> Any:
    """Whose call a request is, as `Sessions.of` takes it: that of a tool has a visitor of its own."""
    name = (getattr(request, "headers", None) or {}).get(VISITOR)
    return SimpleNamespace(session_hash=name) if name else request


def adapt(page: gr.Blocks) -> None:
    """Changes the page's MCP server, where it has one: these tools and no others, files as programs of models have
    them, lists of images as images.
    """
    server = getattr(page, "mcp_server_obj", None)
    if server is None:
        return
    names = {name: endpoint for name, endpoint in server.tool_to_endpoint.items() if endpoint.lstrip("/") in TOOLS}
    server.tool_to_endpoint = names
    as_content, prepare, schema_of = (
        server.postprocess_output_data,
        server._prepare_tool_call_args,
        server.get_input_schema,
    )

    def with_files(arguments: dict[str, Any], _positions: Any) -> dict[str, Any]:
        return {name: files(value) if name in FILES else value for name, value in arguments.items()}

    def files(value: Any) -> Any:
        return [_file(page, one) for one in value] if isinstance(value, list) else _file(page, value)

    def prepared(name: str, arguments: dict[str, Any]) -> Any:
        if name not in names:
            raise InputError(f"There is no tool '{name[:40]}' here; choose among {', '.join(names)}.")
        _check_names(name, arguments, server.api_info["named_endpoints"][names[name]]["parameters"])
        return prepare(name, arguments)

    def input_schema(name: str, parameters: dict[str, str] | None = None) -> tuple[dict[str, Any], list]:
        schema, _ = schema_of(name, parameters)  # no positions of files: Gradio would speak of tools of its own
        return _plain(schema) | {"additionalProperties": False}, []

    async def unchecked(_name: str) -> None:
        """What the package says of bad values does not name the parameter; what the endpoints say does."""

    gradio.mcp.Client = partial(Client, httpx_kwargs={"timeout": PATIENCE})  # type: ignore[misc,assignment]
    server.convert_strings_to_filedata, server.get_input_schema = with_files, input_schema
    server._prepare_tool_call_args = prepared
    server.mcp_server._get_cached_tool_definition = unchecked
    server.postprocess_output_data = lambda data, root: as_content(_flat(data), root)


def _check_names(tool: str, arguments: dict[str, Any], parameters: list[dict[str, Any]]) -> None:
    """Raises InputError for values without a parameter, and for parameters without the value that they need."""
    names = [one["parameter_name"] for one in parameters]
    needed = [one["parameter_name"] for one in parameters if not one["parameter_has_default"]]
    if unknown := [name for name in arguments if name not in names]:
        raise InputError(f"{tool} knows no '{unknown[0][:40]}'; it takes {', '.join(names)}.")
    if missing := [name for name in needed if name not in arguments]:
        raise InputError(f"{tool} lacks its {missing[0]}; give it.")


def _plain(schema: Any) -> Any:
    """The same without what is said twice, and what is left of a file's fields where a text stands for the file."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    left = ("required", "format", SAID_TWICE) if str(schema.get("format", "")).startswith("Gradio") else (SAID_TWICE,)
    return {name: _plain(value) for name, value in schema.items() if name not in left}


def _file(page: gr.Blocks, value: Any) -> Any:
    """A text as the file that it is; anything else is for the endpoint to refuse."""
    if not isinstance(value, str):
        return value
    if "/file=" in value and not value.startswith("data:"):  # whether it lies in the cache is looked at with all files
        return {"path": unquote(value.partition("/file=")[2])}
    head, _, body = value.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise InputError(NO_FILE)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(NO_FILE) from None
    kind = mimetypes.guess_extension(head[5:].partition(";")[0]) or ".bin"
    path = save_bytes_to_cache(data, f"file{kind}", page.GRADIO_CACHE)
    page.upload_file_set.add(path)  # which Gradio clears away in time
    return {"path": str(path)}


def _flat(data: Any) -> list[Any]:
    """The values of an answer one by one: those of a tuple, files of a list, and objects as JSON."""
    values = [value for one in data for value in (one if isinstance(one, tuple) else (one,))]
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list) and value and all(map(is_file_obj_with_meta, value)):
            flat += value
        elif isinstance(value, str) or is_file_obj_with_meta(value):
            flat.append(value)
        else:
            flat.append(json.dumps(value, ensure_ascii=False))
    return flat
