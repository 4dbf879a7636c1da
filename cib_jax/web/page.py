"""The search page: what a browser shows of a collection. Gradio gives layout, theme, controls and their events.

What is asked and answered goes from the browser to the JSON routes of the app that it is mounted on. Nothing goes
through Gradio's own server: no photo is uploaded to it, and no file's name reaches its templates, which would run
`${…}` in a name as a program.
"""

from importlib import resources

import fastapi
import gradio as gr

from cib_jax.web.answers import Collection
from cib_jax.web.limits import Limits

DEFAULT_K, MOST_RESULTS = 20, 100
"""How many results are shown at first, and where the slider ends."""

_PAPER, _INK, _QUIET, _LINE = "#faf9f7", "#1d1c1a", "#66625b", "#dcd8d0"
_PAPER_DARK, _INK_DARK, _QUIET_DARK, _LINE_DARK = "#141413", "#ecebe7", "#a09c94", "#383633"
_ACCENT, _ACCENT_DARK = "#0b5f95", "#6cb6ea"
# The grid of a code, as an icon without a file of its own.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Crect width='32' height='32' rx='7' fill='%230b5f95'/%3E"
    "%3Cpath d='M7 7h8v8H7zM17 17h8v8h-8z' fill='%23fff'/%3E"
    "%3Cpath d='M18 8h6v6h-6zM8 18h6v6H8z' fill='none' stroke='%23fff' stroke-width='2'/%3E%3C/svg%3E"
)


def mount(
    app: fastapi.FastAPI, collection: Collection, *, limits: Limits | None = None, root_path: str | None = None
) -> None:
    """Adds the page at `/`.

    Must come after the API's routes: what no route takes is asked of Gradio.

    Args:
      app: answers `/search`, `/photo`, `/thumbnail/ID` and `/image/ID`.
      collection: whose photos are shown.
      limits: of what is taken; a photo that is too large is refused before it is sent. None: the defaults.
      root_path: the folder, such as "/photos", from which a reverse proxy passes on what is asked below it.
    """
    gr.mount_gradio_app(
        app,
        _blocks(collection, (limits or Limits()).photo_mb * 1_000_000),
        path="/",
        root_path=root_path,
        theme=_theme(),
        # As `css`, Gradio would write the page's selectors anew, each under its own container.
        head=f'<link rel="icon" href="{_ICON}"><style>{_text("page.css")}</style>',
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


def _blocks(collection: Collection, most_bytes: int) -> gr.Blocks:
    count = len(collection)
    with gr.Blocks(title="Photo search", analytics_enabled=False, fill_width=True) as blocks:
        # Its value tells the page what was done: `k` is what the slider says, the others count, so that each is news.
        asked = gr.HTML(
            {"k": DEFAULT_K, "moved": 0, "random": 0},
            html_template=_text("page.html"),
            js_on_load="".join(map(_text, ("bits.js", "asking.js", "page.js"))),
            apply_default_css=False,
            padding=False,
            elem_id="cib-page",
            photos="1 photo" if count == 1 else f"{count:,} photos",
            bits=collection.bits,
            most_results=MOST_RESULTS,
            most_bytes=most_bytes,
        )
        with asked, gr.Row(elem_id="cib-controls"):
            choose = gr.Button("Choose a photo", variant="primary", elem_id="cib-choose", min_width=120)
            another = gr.Button("Another random photo", elem_id="cib-another", min_width=120)
            how_many = gr.Slider(
                1, MOST_RESULTS, DEFAULT_K, step=1, label="How many", elem_id="cib-how-many", buttons=[]
            )
        # All run in the browser: without a Python function, nothing is sent.
        choose.click(None, js="() => document.getElementById('cib-file').click()")
        another.click(None, asked, asked, js="(asked) => ({...asked, random: asked.random + 1})")
        how_many.input(None, [asked, how_many], asked, js="(asked, k) => ({...asked, k, moved: asked.moved + 1})")
        asked.went(None, asked, how_many, js="(asked) => asked.k")
    return blocks


def _theme() -> gr.themes.Base:
    system = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    return gr.themes.Base(font=system, font_mono=mono, radius_size="md").set(
        body_background_fill=_PAPER,
        body_background_fill_dark=_PAPER_DARK,
        body_text_color=_INK,
        body_text_color_dark=_INK_DARK,
        body_text_color_subdued=_QUIET,
        body_text_color_subdued_dark=_QUIET_DARK,
        border_color_primary=_LINE,
        border_color_primary_dark=_LINE_DARK,
        color_accent=_ACCENT,
        slider_color=_ACCENT,
        slider_color_dark=_ACCENT_DARK,
        button_primary_background_fill=_ACCENT,
        button_primary_background_fill_dark=_ACCENT_DARK,
        button_primary_background_fill_hover="#084b77",
        button_primary_background_fill_hover_dark="#8cc8f2",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark=_PAPER_DARK,
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="#efece6",
        button_secondary_background_fill_hover_dark="#242321",
        button_secondary_border_color="#8f8a81",
        button_secondary_border_color_dark="#7a766e",
        button_secondary_text_color=_INK,
        button_secondary_text_color_dark=_INK_DARK,
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
    )


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
