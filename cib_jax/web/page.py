"""Search page for browsers, built with Gradio's layout, theme, controls and events.

All requests of the page go to the JSON API of the app that it is mounted on, and none to Gradio's own server: no photo
is uploaded to Gradio, and no file name reaches its templates, which would execute `${…}` in a name.
"""

from importlib import resources

import fastapi
import gradio as gr

from cib_jax.web.api import Collection, format_count
from cib_jax.web.settings import Settings

DEFAULT_K, MAX_K = 20, 100
"""Number of results at first, and at the end of the slider."""

_COLORS = {  # on light and on dark
    "body_background_fill": ("#faf9f7", "#141413"),
    "body_text_color": ("#1d1c1a", "#ecebe7"),
    "body_text_color_subdued": ("#66625b", "#a09c94"),
    "border_color_primary": ("#dcd8d0", "#383633"),
    "slider_color": ("#0b5f95", "#6cb6ea"),
    "button_primary_background_fill": ("#0b5f95", "#6cb6ea"),
    "button_primary_background_fill_hover": ("#084b77", "#8cc8f2"),
    "button_primary_text_color": ("#ffffff", "#141413"),
    "button_secondary_background_fill": ("transparent", "transparent"),
    "button_secondary_background_fill_hover": ("#efece6", "#242321"),
    "button_secondary_border_color": ("#8f8a81", "#7a766e"),
    "button_secondary_text_color": ("#1d1c1a", "#ecebe7"),
    "block_background_fill": ("transparent", "transparent"),
}
"""Variables of Gradio's theme."""
# The bits of a code as an icon, inline so that no other file is requested.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Crect width='32' height='32' rx='7' fill='%230b5f95'/%3E"
    "%3Cpath d='M7 7h8v8H7zM17 17h8v8h-8z' fill='%23fff'/%3E"
    "%3Cpath d='M18 8h6v6h-6zM8 18h6v6H8z' fill='none' stroke='%23fff' stroke-width='2'/%3E%3C/svg%3E"
)


def mount(
    app: fastapi.FastAPI, collection: Collection, *, settings: Settings | None = None, root_path: str | None = None
) -> None:
    """Adds the page at `/`, after the API's routes: Gradio answers what no earlier route matches.

    By `settings`, the page refuses a photo that is too large before it is sent. `root_path` is a path, such as
    "/photos", that a reverse proxy strips from the requests that it passes on.
    """
    gr.mount_gradio_app(
        app,
        _blocks(collection, (settings or Settings()).photo_mb * 1_000_000),
        path="/",
        root_path=root_path,
        theme=_theme(),
        # Not as `css`, because Gradio would prefix each of the selectors with its container.
        head=f'<link rel="icon" href="{_ICON}"><style>{_text("page.css")}</style>',
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


def _blocks(collection: Collection, max_bytes: int) -> gr.Blocks:
    with gr.Blocks(title="Photo search", analytics_enabled=False, fill_width=True) as blocks:
        # The controls write into this value, which page.js watches: `k` is the slider's value, and the other two count
        # events, so that the value changes at each of them.
        controls = gr.HTML(
            {"k": DEFAULT_K, "moved": 0, "random": 0},
            html_template=_text("page.html"),
            js_on_load="".join(map(_text, ("code_glyph.js", "api.js", "page.js"))),
            apply_default_css=False,
            padding=False,
            elem_id="cib-page",
            photos=format_count(collection),
            bits=collection.bits,
            max_k=MAX_K,
            max_bytes=max_bytes,
        )
        with controls, gr.Row(elem_id="cib-controls"):
            choose = gr.Button("Choose a photo", variant="primary", elem_id="cib-choose", min_width=120)
            another = gr.Button("Another random photo", elem_id="cib-another", min_width=120)
            how_many = gr.Slider(1, MAX_K, DEFAULT_K, step=1, label="How many", elem_id="cib-how-many", buttons=[])
        # All of these run in the browser; without a Python function, nothing is sent to Gradio.
        choose.click(None, js="() => document.getElementById('cib-file').click()")
        another.click(None, controls, controls, js="(value) => ({...value, random: value.random + 1})")
        how_many.input(None, [controls, how_many], controls, js="(value, k) => ({...value, k, moved: value.moved + 1})")
        controls.navigated(None, controls, how_many, js="(value) => value.k")
    return blocks


def _theme() -> gr.themes.Base:
    system = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    colors = {name: light for name, (light, _) in _COLORS.items()}
    colors |= {f"{name}_dark": dark for name, (_, dark) in _COLORS.items()}
    theme = gr.themes.Base(font=system, font_mono=mono, radius_size="md")
    return theme.set(**colors, color_accent="#0b5f95", block_border_width="0px", block_shadow="none")


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
