"""The page put together over a loaded pipeline, and served: limits, looks, and what Gradio must not say."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from diffusers.utils import logging as diffusers_log
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.middleware import Middleware

from facesnap.errors import InputError
from facesnap.web import agents, uploads, views
from facesnap.web.door import MALFORMED, Door, for_visitors
from facesnap.web.endpoints import MOST_AT_ONCE, PARAMETERS, add_endpoints
from facesnap.web.events import Events
from facesnap.web.form import Form
from facesnap.web.line import Listeners
from facesnap.web.studio import MOST_WAITING, Studio

ASSETS = Path(__file__).parents[2] / "assets"
MOST_SESSIONS = 128  # whose copy of the page's configuration, 0.2 MB each, the server keeps; every API call opens one

THEME = gr.themes.Base(
    primary_hue=gr.themes.Color(
        "#eef5f4", "#d8e8e6", "#b3d1ce", "#86b5b1", "#5b9691", "#3d7a76",
        "#2c6360", "#245150", "#1e4241", "#193636", "#0f2524",
    ),
    neutral_hue=gr.themes.Color(
        "#faf8f5", "#f3f0eb", "#e6e1d9", "#d2cbc0", "#a39b8f", "#716a60",
        "#5a544c", "#423e38", "#2f2d29", "#1f1e1b", "#151412",
    ),
    radius_size="lg",
    # Fonts of the system: a page that works offline cannot ask for others.
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    input_background_fill="*neutral_100",
    input_background_fill_dark="#181715",
    input_border_color_dark="*neutral_800",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_secondary_background_fill_dark="*neutral_800",
    button_secondary_background_fill_hover_dark="*neutral_700",
    checkbox_background_color_dark="*neutral_900",
    checkbox_border_color="*neutral_400",
    checkbox_border_color_dark="*neutral_500",
    block_background_fill_dark="*neutral_900",
    block_border_color_dark="*neutral_800",
)  # fmt: skip


class Blocks(gr.Blocks):
    """Gradio's, in which whatever goes wrong before, in or after a handler is one sentence. Gradio itself would show
    its callers nothing, or paths of the server, and print what they sent."""

    listeners: Listeners
    settings: Any  # of the checkpoint
    assets: Path

    async def process_api(self, block_fn: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _refuse_forged(block_fn, kwargs.get("event_data"))
            uploads.admit(inputs)
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except gr.Error as error:
            error.print_exception = False  # Gradio's own of a choice that there is not repeats what was sent
            raise
        except Exception as error:
            raise gr.Error(for_visitors(error), print_exception=False) from None

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        """What no page would have sent to one of its own events is the sender's fault, and nothing for the log."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            if "(type: <class" in str(error.message):  # of a choice that there is not, and so no page's
                raise InputError(MALFORMED) from None
            raise
        except OSError:
            raise
        except Exception:
            raise InputError(MALFORMED) from None


def _refuse_forged(block_fn: Any, event_data: Any) -> None:
    """InputError for an event that a page handles by itself, and for a choice of nothing."""
    if block_fn.fn is None:
        raise InputError(MALFORMED)
    if gr.SelectData in get_type_hints(block_fn.fn).values():
        chosen = event_data._data if event_data is not None else None
        if not isinstance(chosen, dict) or type(chosen.get("index")) is not int or "value" not in chosen:
            raise InputError(MALFORMED)


def _say_malformed(request: Any, error: Exception) -> JSONResponse:
    """FastAPI's own repeats what was sent, and falls over values that are no JSON."""
    return JSONResponse({"detail": MALFORMED}, 422)


def build(
    pipeline: Any,
    *,
    allowed: Callable[[Image.Image], None] = lambda picture: None,
    on_gpu: Callable[[Any], Any] = lambda generator: generator,
    most_waiting: int = MOST_WAITING,
    assets: Path = ASSETS,
) -> Blocks:
    """The whole page over a loaded `FaceSnapPipeline`; allowed, on_gpu and most_waiting as in `Studio`; assets: the
    folder of the examples, if there are any."""
    scratch = uploads.scratch(uploads.folder())
    studio = Studio(pipeline, on_gpu=on_gpu, allowed=allowed, most_waiting=most_waiting, scratch=scratch)
    with Blocks(title="FaceSnap", analytics_enabled=False) as demo:
        demo.listeners, demo.settings = Listeners(), pipeline.settings
        Events(Form(pipeline, assets), studio, demo.listeners)
        add_endpoints(studio, demo.listeners)
    return demo


def launch(demo: Blocks, *, prevent_thread_lock: bool = False, **options: Any) -> Any:
    """Limits and looks. Nothing is kept, no server text is shown, nothing is asked of the network. Returns when the
    page is closed, or at once with `prevent_thread_lock`."""
    here = Path(__file__).parent
    diffusers_log.set_verbosity_error()  # it warns of long prompts with their words
    has_agents = importlib.util.find_spec("mcp") is not None
    door = Middleware(
        Door,
        listeners=demo.listeners,
        endpoints=PARAMETERS,
        events=frozenset(demo.fns),
        check_message=agents.check_message if has_agents else None,
    )
    own_app = {
        "middleware": [door],
        "lifespan": uploads.keeping_clean(),
        "exception_handlers": {RequestValidationError: _say_malformed},
        "openapi_url": None,  # FastAPI's own, of all that Gradio could do
    }
    launched = demo.queue(api_open=False, max_size=2 * MOST_AT_ONCE).launch(
        theme=THEME,
        css=(here / "page.css").read_text(encoding="utf-8") + views.pose_tiles(),
        head=f"<script>{(here / 'page.js').read_text(encoding='utf-8')}</script>",
        max_file_size=uploads.MOST_BYTES,
        max_threads=2 * MOST_AT_ONCE,
        show_error=False,
        state_session_capacity=MOST_SESSIONS,
        run_history=False,
        footer_links=["api"],
        ssr_mode=False,
        mcp_server=has_agents,
        enable_monitoring=False,  # whoever asked for it had its secret address printed
        app_kwargs=own_app,
        prevent_thread_lock=True,  # there is something left to do
        **options,
    )
    if mcp := demo.mcp_server_obj:
        mcp.api_info = agents.for_agents(mcp.api_info)
        agents.answer_in_words(mcp, demo.settings)
    if not prevent_thread_lock:
        demo.block_thread()
    return launched
