"""What agents are told over MCP, and the sentences for what its library would refuse, and log, in words of its own."""

import copy
import json
from typing import Any

from facesnap.errors import InputError, did_you_mean, shown
from facesnap.web.door import Refused, refuse_unknown
from facesnap.web.endpoints import PARAMETERS
from facesnap.web.request import SPECS, PortraitRequest

NO_MESSAGE = "This is none of the messages that are answered here: initialize, ping, tools/list and tools/call."


def check_message(body: bytes) -> None:
    """Raises Refused for what is posted and no message of MCP: the library would log it with what it holds."""
    from mcp import types

    try:
        message = types.JSONRPCMessage.model_validate(json.loads(body)).root
        str(getattr(message, "id", "")).encode()  # half a character could not be answered
    except (ValueError, RecursionError):
        raise _refused(NO_MESSAGE) from None
    kinds: dict[Any, Any] = {
        types.JSONRPCRequest: types.ClientRequest,
        types.JSONRPCNotification: types.ClientNotification,
    }
    if (kind := kinds.get(type(message))) is None:
        return
    try:
        kind.model_validate(message.model_dump(by_alias=True, mode="json", exclude_none=True))
    except ValueError:
        if type(message) is types.JSONRPCNotification:  # which wants no answer
            raise Refused(b"", 202) from None
        raise _refused(NO_MESSAGE, getattr(message, "id", None), 200) from None


def _refused(words: str, number: Any = "server-error", status: int = 400) -> Refused:
    told = {"jsonrpc": "2.0", "id": number, "error": {"code": -32602, "message": words}}
    return Refused(json.dumps(told, ensure_ascii=False).encode(), status)


def for_agents(api_info: dict[str, Any]) -> dict[str, Any]:
    """Gradio's description of the endpoints as agents shall read it: photos are strings, numbers may be strings and
    anything may be null. Whatever is wrong with a value is then said by the request and not by a schema."""
    told = copy.deepcopy(api_info)
    for endpoint in told["named_endpoints"].values():
        for parameter in endpoint["parameters"]:
            kind = SPECS[parameter["parameter_name"]].kind
            name = {"number": "number", "switch": "boolean", "weights": "object"}.get(kind, "string")
            parameter["type"] = {"type": [name, "string", "null"] if name != "string" else ["string", "null"]}
    return told


def answer_in_words(mcp: Any, settings: Any) -> None:
    """mcp: Gradio's server. It refuses a list or an object by its schema, and an unknown name, in words of libraries:
    the request itself is asked first. There are no prompts and no resources, whatever is asked of them."""
    from mcp import types

    handlers = mcp.mcp_server.request_handlers
    answer = handlers[types.CallToolRequest]

    async def call(asked: Any) -> Any:
        try:
            _check_call(mcp.tool_to_endpoint, asked.params.name, asked.params.arguments or {}, settings)
        except InputError as error:
            text = types.TextContent(type="text", text=str(error))
            return types.ServerResult(types.CallToolResult(content=[text], isError=True))
        return await answer(asked)

    async def nothing(asked: Any) -> Any:
        raise InputError("There are tools here, and no prompts or resources: tools/list names them.")

    handlers[types.CallToolRequest] = call
    for kind in (types.ReadResourceRequest, types.GetPromptRequest):
        handlers[kind] = nothing


def _check_call(tools: dict[str, str], tool: str, given: dict[str, Any], settings: Any) -> None:
    if tool not in tools:
        raise InputError(f"There is no tool {shown(tool)!r}; {did_you_mean(tool, tools)}")
    refuse_unknown(given, PARAMETERS[tools[tool].lstrip("/")])
    request = PortraitRequest.parse(given)
    for name in given:
        request.check_value(name, settings)
