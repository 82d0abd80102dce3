"""The examples of docs/api.md, run as they stand there, and the tools that agents find."""

import base64
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from facesnap.web import server

ROOT = Path(__file__).parents[1]


def example(language: str, page, files, folder: Path) -> str:
    """The code block in that language of docs/api.md, for this server, with a photo beside it."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = re.search(rf"```{language}\n(.*?)```", text, re.S).group(1)
    shutil.copy(files.ann, folder / "me.jpg")
    page.pipe.fresh()
    return code.replace("http://127.0.0.1:7860", page.url.rstrip("/"))


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_python(page, files, tmp_path):
    code = example("python", page, files, tmp_path)
    path, seed, *words = run(sys.executable, "-c", code, folder=tmp_path).strip().splitlines()[-1].split()
    assert Image.open(path).size == (64, 64) and int(seed) >= 0 and "likeness" in words


def test_the_documented_javascript(page, files, tmp_path):
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("JavaScript's example needs node and npm: apt-get install nodejs npm")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "@gradio/client"], cwd=tmp_path, capture_output=True, timeout=300
    )
    if installed.returncode:
        pytest.skip("npm cannot reach a registry here, and JavaScript's example needs @gradio/client from it")
    (tmp_path / "example.mjs").write_text(example("js", page, files, tmp_path))
    said = run("node", "example.mjs", folder=tmp_path)
    assert said.startswith("http") and "likeness" in said


def test_the_documented_curl(page, files, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl's example needs curl: apt-get install curl")
    said = run("bash", "-euc", example("bash", page, files, tmp_path), folder=tmp_path)
    assert "event: complete" in said and '"seed"' in said and '.png"' in said


def test_agents_find_and_call_the_two_tools(page, files):
    pytest.importorskip("mcp", reason='the MCP server needs its extra: pip install "gradio[mcp]"')
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    page.pipe.fresh()
    photo = "data:image/png;base64," + base64.b64encode(Path(files.ann).read_bytes()).decode()

    async def talk():
        async with streamablehttp_client(f"{page.url}gradio_api/mcp/") as (reading, writing, _):
            async with ClientSession(reading, writing) as session:
                await session.initialize()
                tools = {tool.name: tool for tool in (await session.list_tools()).tools}
                asked = {"reference": photo, "prompt": "by the sea", "consent": True, "seed": 3}
                made = await session.call_tool(next(name for name in tools if "generate" in name), asked)
                wrong = [
                    {"consent": False},
                    {"steps": [1, 2]},
                    {"prompt": {"a": 1}},
                    {"reference_2": [photo]},
                    {"stepss": 3},
                ]
                name = next(name for name in tools if "generate" in name)
                refused = [await session.call_tool(name, asked | one) for one in wrong]
                return tools, made, refused

    with ThreadPoolExecutor(1) as thread:  # the browser's tests leave a loop running in this one
        tools, made, refused = thread.submit(asyncio.run, talk()).result()
    assert len(tools) == 2 and all(any(word in name for word in ("preview", "generate")) for name in tools)
    assert not made.isError and '"seed": 3' in str(made.content).replace("'", '"')
    words = [
        "The consent must be true",
        "steps is [1, 2]",
        "prompt must be text",
        "reference 2 must be text",
        "did you mean 'steps'",
    ]
    for answer, said in zip(refused, words, strict=True):
        assert answer.isError and said in str(answer.content), answer.content


def test_agents_are_told_the_same_where_the_page_is_served_until_it_ends(pipe, monkeypatch):
    pytest.importorskip("mcp", reason='the MCP server needs its extra: pip install "gradio[mcp]"')
    demo, told = server.build(pipe), []
    monkeypatch.setattr(demo, "block_thread", lambda: told.append(demo.mcp_server_obj.api_info))
    server.launch(demo, quiet=True)
    demo.close()
    (told,) = told
    reference, *_ = told["named_endpoints"]["/preview"]["parameters"]
    assert reference["type"] == {"type": ["string", "null"]}
